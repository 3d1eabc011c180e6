//! Memory on a GPU that stays until nobody refers to it: allocated here, or of another process.

use super::driver::name;
use super::{Context, CudaError};
use crate::{DmaBuf, Memory};
use cudarc::driver::sys::{self, CUdeviceptr, CUipcMemHandle, CUmemRangeHandleType, CUresult};
use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What this process has exported, for those of its members that are handed it: the driver opens no handle in the process
/// that it comes from.
static EXPORTED: Mutex<Vec<([u8; 64], Weak<DeviceMemory>)>> = Mutex::new(Vec::new());

/// What allocations are rounded up to: what the driver shares with other processes, and whole pages of every host.
const GRANULE: usize = 2 << 20;

/// Device memory. Wrapped in a [`crate::Region`] it is registered like any other, by providers that reach devices; it is
/// freed when the last region, stream or graph that refers to it is gone. Freeing waits for all that this process has on the GPU,
/// at gates too: a step is over, or given up, before memory is let go.
pub struct DeviceMemory {
    context: Arc<Context>,
    address: CUdeviceptr,
    len: usize,
    dma_buf: Option<OwnedFd>,
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMemory({:#x}, {} bytes, GPU {})", self.address, self.len, self.context.index())
    }
}

impl DeviceMemory {
    /// At least `bytes` bytes, rounded up to 2 MiB, of undefined contents.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`]; [`CudaError::Invalid`] for no bytes at all.
    pub fn allocate(context: &Arc<Context>, bytes: usize) -> Result<Arc<Self>, CudaError> {
        let len = bytes.checked_next_multiple_of(GRANULE).filter(|len| *len > 0);
        let len =
            len.ok_or_else(|| CudaError::Invalid(format!("allocating {bytes} bytes on a GPU: 1 byte is the least")))?;
        context.enter()?;
        let mut address = 0;
        // SAFETY: the pointer is valid; freed when this is dropped.
        match unsafe { sys::cuMemAlloc_v2(&mut address, len) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = context.memory().unwrap_or_default();
                return Err(CudaError::OutOfMemory { index: context.index(), bytes: len, free, total });
            }
            answer => super::driver::check(context.index(), "cuMemAlloc", answer)?,
        }
        let mut memory = Self { context: context.clone(), address, len, dma_buf: None };
        // Without one, a network device may still reach it as peer memory.
        memory.dma_buf = if context.exports_dma_buf() { memory.export_dma_buf() } else { None };
        Ok(Arc::new(memory))
    }

    fn export_dma_buf(&self) -> Option<OwnedFd> {
        let mut fd = -1_i32;
        let kind = CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
        let (to, len) = ((&raw mut fd).cast(), self.len);
        // SAFETY: of this kind the handle is an `int`; the range is the allocation's, whole pages.
        let answer = unsafe { sys::cuMemGetHandleForAddressRange(to, self.address, len, kind, 0) };
        if answer != CUresult::CUDA_SUCCESS || fd < 0 {
            tracing::info!("GPU {} exports no dma-buf: {}", self.context.index(), name(answer));
            return None;
        }
        // SAFETY: a descriptor that the driver has just made for us.
        Some(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// What another process of this host opens it by.
    ///
    /// # Errors
    /// The driver refuses, as in a container that may not share memory.
    pub fn export(self: &Arc<Self>) -> Result<ExportedMemory, CudaError> {
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the pointer is valid, the address is an allocation's first.
        self.context.call("cuIpcGetMemHandle", || unsafe { sys::cuIpcGetMemHandle(&mut handle, self.address) })?;
        let handle = handle.reserved.map(|byte| byte as u8);
        let mut exported = EXPORTED.lock().unwrap_or_else(PoisonError::into_inner);
        exported.retain(|(known, memory)| *known != handle && memory.strong_count() > 0);
        exported.push((handle, Arc::downgrade(self)));
        Ok(ExportedMemory { handle, len: self.len as u64 })
    }

    /// The GPU that it is on.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.dma_buf = None;
        // SAFETY: allocated once; whoever refers to it keeps it, so nobody does.
        let freed = self.context.call("cuMemFree", || unsafe { sys::cuMemFree_v2(self.address) });
        if let Err(error) = freed {
            tracing::warn!("freeing {self:?}: {error}");
        }
    }
}

/// A name of device memory for another process. Not a secret in itself: the driver gives memory to processes of the same
/// user only.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ExportedMemory {
    handle: [u8; 64],
    len: u64,
}

impl fmt::Debug for ExportedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExportedMemory({} bytes)", self.len)
    }
}

impl ExportedMemory {
    /// Its length on the wire.
    pub const BYTES: usize = 72;

    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// The memory itself, if it is of this process.
    pub(super) fn own(&self) -> Option<Arc<DeviceMemory>> {
        let exported = EXPORTED.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, memory) = exported.iter().find(|(handle, _)| *handle == self.handle)?;
        memory.upgrade().filter(|memory| memory.len == self.len())
    }

    /// For the wire.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..64].copy_from_slice(&self.handle);
        bytes[64..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// From the wire; whether there is such memory only opening it tells.
    ///
    /// # Errors
    /// [`CudaError::Invalid`] for another length, or a size that no allocation has.
    pub fn decode(bytes: &[u8]) -> Result<Self, CudaError> {
        let invalid = |what: String| Err(CudaError::Invalid(format!("not a handle of GPU memory: {what}")));
        let (Some(handle), Some(len)) =
            (bytes.first_chunk::<64>(), bytes.get(64..).and_then(|len| len.try_into().ok()))
        else {
            return invalid(format!("{} bytes instead of {}", bytes.len(), Self::BYTES));
        };
        let len = u64::from_le_bytes(len);
        if len == 0 || !len.is_multiple_of(GRANULE as u64) || len > isize::MAX as u64 {
            return invalid(format!("it says that it is of {len} bytes"));
        }
        Ok(Self { handle: *handle, len })
    }
}

/// Device memory of another process, mapped here: what copy engines read and write in place.
pub struct PeerMemory {
    context: Arc<Context>,
    address: CUdeviceptr,
    len: usize,
}

impl fmt::Debug for PeerMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerMemory({:#x}, {} bytes, GPU {})", self.address, self.len, self.context.index())
    }
}

impl PeerMemory {
    /// Opens what another process exported. The exporter must keep it until this is dropped.
    ///
    /// # Errors
    /// [`CudaError::Peer`].
    pub fn open(context: &Arc<Context>, exported: &ExportedMemory) -> Result<Arc<Self>, CudaError> {
        let handle = CUipcMemHandle { reserved: exported.handle.map(|byte| byte as _) };
        let mut address = 0;
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: the pointer is valid; closed when this is dropped. The driver checks the handle.
        let open = || unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, flags) };
        context.ask("cuIpcOpenMemHandle", open)?.map_err(|name| CudaError::Peer { name })?;
        Ok(Arc::new(Self { context: context.clone(), address, len: exported.len as usize }))
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        // SAFETY: opened once; whoever refers to it keeps it, so nobody does.
        let closed = self.context.call("cuIpcCloseMemHandle", || unsafe { sys::cuIpcCloseMemHandle(self.address) });
        if let Err(error) = closed {
            tracing::warn!("closing {self:?}: {error}");
        }
    }
}

/// An address on a device: no pointer of this process's, so nothing is at it that the CPU could reach.
fn base(address: CUdeviceptr) -> NonNull<u8> {
    NonNull::new(std::ptr::without_provenance_mut(address as usize)).unwrap_or(NonNull::dangling())
}

// SAFETY: the allocation neither moves nor is freed before the value is; it says that it is a device's.
unsafe impl Memory for DeviceMemory {
    fn base(&self) -> NonNull<u8> {
        base(self.address)
    }

    fn len(&self) -> usize {
        self.len
    }

    fn gpu(&self) -> Option<u32> {
        Some(self.context.index())
    }

    fn dma_buf(&self) -> Option<DmaBuf<'_>> {
        self.dma_buf.as_ref().map(|fd| DmaBuf { fd: fd.as_fd(), offset: 0 })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

// SAFETY: the mapping neither moves nor is closed before the value is; it says that it is a device's.
unsafe impl Memory for PeerMemory {
    fn base(&self) -> NonNull<u8> {
        base(self.address)
    }

    fn len(&self) -> usize {
        self.len
    }

    fn gpu(&self) -> Option<u32> {
        Some(self.context.index())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
