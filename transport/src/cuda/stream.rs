//! Work in order on a GPU: copies between spans of memory, and the operations of gates.

use super::{Context, CudaError};
use crate::{Memory, Region};
use cudarc::driver::sys::{
    self, CUdeviceptr, CUmemorytype, CUpointer_attribute, CUresult, CUstream, CUstream_flags, CUstreamBatchMemOpParams,
    CUstreamCaptureStatus,
};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Some bytes of a region, on a device or of pinned host memory.
#[derive(Clone, Debug)]
pub struct Span {
    region: Region,
    range: Range<usize>,
}

impl Span {
    /// `range` of `region`.
    ///
    /// # Errors
    /// [`CudaError::Invalid`] if it has no such bytes.
    pub fn new(region: &Region, range: Range<usize>) -> Result<Self, CudaError> {
        if range.start > range.end || range.end > region.len() {
            return Err(CudaError::Invalid(format!("{range:?} is outside a region of {} bytes", region.len())));
        }
        Ok(Self { region: region.clone(), range })
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// What it is of.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Some of its bytes.
    ///
    /// # Errors
    /// [`CudaError::Invalid`] if it has no such bytes.
    pub fn part(&self, range: Range<usize>) -> Result<Self, CudaError> {
        if range.start > range.end || range.end > self.len() {
            return Err(CudaError::Invalid(format!("{range:?} is outside a span of {} bytes", self.len())));
        }
        let start = self.range.start;
        Ok(Self { region: self.region.clone(), range: start + range.start..start + range.end })
    }

    /// Where it begins, as the driver and kernels name it.
    pub fn address(&self) -> CUdeviceptr {
        (self.region.base().addr().get() + self.range.start) as CUdeviceptr
    }
}

/// A stream of its own, which does not wait for the legacy default stream. Memory that its work refers to is kept until the
/// work is seen to be over.
pub struct Stream {
    context: Arc<Context>,
    raw: CUstream,
    /// Made here, and to be destroyed.
    owned: bool,
    /// What work under way refers to. While the stream is captured, what the graph will refer to.
    held: Mutex<Held>,
}

/// Memory, by where it is kept: a model's weights are thousands of pieces, and every kernel names some.
pub(super) type Kept = BTreeMap<usize, Arc<dyn Memory>>;

/// What a stream's work refers to: itself, and as what graphs refer to.
#[derive(Default)]
pub(super) struct Held {
    pub(super) memory: Kept,
    graphs: Vec<Arc<Kept>>,
}

// SAFETY: a stream may be used from any thread; the driver locks.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:p}, GPU {})", self.raw, self.context.index())
    }
}

impl Stream {
    /// An idle stream.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        let (mut raw, flags) = (ptr::null_mut(), CUstream_flags::CU_STREAM_NON_BLOCKING as u32);
        // SAFETY: the pointer is valid; destroyed when this is dropped.
        context.call("cuStreamCreate", || unsafe { sys::cuStreamCreate(&mut raw, flags) })?;
        Ok(Self { context: context.clone(), raw, owned: true, held: Mutex::default() })
    }

    /// A stream of an engine's, for gates and copies among its kernels. It stays the engine's.
    ///
    /// # Safety
    /// `raw` is a stream of this GPU's primary context, and lives for as long as this does.
    pub unsafe fn of_engine(context: &Arc<Context>, raw: CUstream) -> Self {
        Self { context: context.clone(), raw, owned: false, held: Mutex::default() }
    }

    /// The GPU that it is of.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The driver's own handle, for an engine that puts its kernels on the same stream.
    pub fn raw(&self) -> CUstream {
        self.raw
    }

    /// Copies, behind all that is on the stream. Between host and device, copy engines do it; between two places of one GPU,
    /// drivers up to CUDA 13.0 use its multiprocessors, whatever they are asked for: what is produced in a slot needs no copy.
    ///
    /// # Errors
    /// [`CudaError::Invalid`] if the spans differ in length, if the target may not be written, if host memory is not pinned, or if
    /// both are host memory: the driver would have the CPU wait for all that is on the stream, perhaps for a gate that this very
    /// thread opens.
    pub fn copy(&self, from: &Span, to: &Span) -> Result<(), CudaError> {
        let len = from.range.len();
        if len != to.range.len() {
            return Err(CudaError::Invalid(format!("copying {len} bytes to {}", to.range.len())));
        }
        if !to.region.writable() {
            return Err(CudaError::Invalid("copying to memory that may not be written".into()));
        }
        if !from.region.on_device() && !to.region.on_device() {
            return Err(CudaError::Invalid("copying from host memory to host memory: that is the CPU's work".into()));
        }
        for span in [from, to] {
            if !span.region.on_device() && !self.is_pinned(span)? {
                return Err(CudaError::Invalid(format!(
                    "copying {:?}, which is not pinned: `PinnedMemory::pin` it",
                    span.region
                )));
            }
        }
        self.hold([from.region.memory(), to.region.memory()].into_iter().cloned());
        // SAFETY: both spans lie in memory that is kept until the copy is over.
        let copy = || unsafe { sys::cuMemcpyAsync(to.address(), from.address(), len, self.raw) };
        self.context.call("cuMemcpyAsync", copy)
    }

    /// As [`Stream::copy`], between addresses of an engine's tensors and of pinned memory; nothing is kept.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// Both are `len` bytes of the GPU's or of pinned memory, valid until the copy is over, and nobody else uses the target
    /// meanwhile.
    pub unsafe fn copy_between(&self, from: CUdeviceptr, to: CUdeviceptr, len: usize) -> Result<(), CudaError> {
        // SAFETY: by the contract.
        self.context.call("cuMemcpyAsync", || unsafe { sys::cuMemcpyAsync(to, from, len, self.raw) })
    }

    fn is_pinned(&self, span: &Span) -> Result<bool, CudaError> {
        Ok(self.kind_of(span.address())? == Some(CUmemorytype::CU_MEMORYTYPE_HOST as u32))
    }

    /// Where the stream finds what is at an address of a device's memory, or of pinned host memory; none for what it cannot reach.
    ///
    /// # Errors
    /// The device is lost, or the memory was pinned for others only.
    pub fn finds(&self, address: CUdeviceptr) -> Result<Option<CUdeviceptr>, CudaError> {
        match self.kind_of(address)? {
            Some(kind) if kind == CUmemorytype::CU_MEMORYTYPE_DEVICE as u32 => Ok(Some(address)),
            Some(kind) if kind == CUmemorytype::CU_MEMORYTYPE_HOST as u32 => {
                let (mut found, host) = (0, address as *mut _);
                // SAFETY: the pointer is valid; the address is only looked up.
                let look = || unsafe { sys::cuMemHostGetDevicePointer_v2(&mut found, host, 0) };
                self.context.call("cuMemHostGetDevicePointer", look)?;
                Ok(Some(found))
            }
            _ => Ok(None),
        }
    }

    /// What kind of memory an address is of; none for what the driver does not know.
    fn kind_of(&self, address: CUdeviceptr) -> Result<Option<u32>, CudaError> {
        let mut kind = 0_u32;
        let (to, attribute) = ((&raw mut kind).cast(), CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
        // SAFETY: of this attribute the value is 32 bits; the address is only looked up.
        let look = || unsafe { sys::cuPointerGetAttribute(to, attribute, address) };
        Ok(self.context.ask("cuPointerGetAttribute", look)?.is_ok().then_some(kind))
    }

    /// Stream memory operations in one batch, which refer to `memory`.
    pub(super) fn batch(
        &self,
        operations: &mut [CUstreamBatchMemOpParams],
        memory: Arc<dyn Memory>,
    ) -> Result<(), CudaError> {
        self.hold([memory]);
        // SAFETY: the addresses lie in memory that is kept until they are over.
        unsafe { self.operate(operations) }
    }

    /// The same; nothing is kept.
    ///
    /// # Safety
    /// The addresses are valid until the operations are over.
    pub(super) unsafe fn operate(&self, operations: &mut [CUstreamBatchMemOpParams]) -> Result<(), CudaError> {
        let (count, first) = (operations.len() as u32, operations.as_mut_ptr());
        // SAFETY: so many operations, valid by the contract.
        self.context.call("cuStreamBatchMemOp", || unsafe { sys::cuStreamBatchMemOp_v2(self.raw, count, first, 0) })
    }

    /// Which capture what is put on it now goes into, a number that no other capture of this process has; none if it is executed.
    ///
    /// # Errors
    /// [`CudaError::Capture`] if the capture was spoiled; the device is lost.
    pub fn capture(&self) -> Result<Option<u64>, CudaError> {
        let (mut status, mut id) = (CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE, 0);
        let (graph, dependencies, count) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        // SAFETY: the first two pointers are valid, and the others are not wanted.
        let look =
            || unsafe { sys::cuStreamGetCaptureInfo_v2(self.raw, &mut status, &mut id, graph, dependencies, count) };
        self.context.call("cuStreamGetCaptureInfo", look)?;
        match status {
            CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(None),
            CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE => Ok(Some(id)),
            _ => Err(CudaError::Capture { name: "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED".into() }),
        }
    }

    /// Whether all work on it is over; memory that only its work referred to is let go then.
    ///
    /// # Errors
    /// [`CudaError::Lost`] if the work has failed.
    pub fn is_idle(&self) -> Result<bool, CudaError> {
        let mut held = self.held();
        self.context.enter()?;
        // SAFETY: the stream is this one's.
        match unsafe { sys::cuStreamQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            answer => {
                super::driver::check(self.context.index(), "cuStreamQuery", answer)?;
                *held = Held::default();
                Ok(true)
            }
        }
    }

    /// Waits until all work on it is over.
    ///
    /// # Errors
    /// [`CudaError::Lost`] if the work has failed; [`CudaError::Invalid`] if it takes longer.
    pub fn finish(&self, timeout: Duration) -> Result<(), CudaError> {
        let started = Instant::now();
        while !self.is_idle()? {
            if started.elapsed() > timeout {
                return Err(CudaError::Invalid(format!("{self:?} still has work after {timeout:?}")));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Keeps memory until the work that is on the stream now is over: what kernels that a client launches refer to.
    pub fn hold(&self, memory: impl IntoIterator<Item = Arc<dyn Memory>>) {
        let mut held = self.held();
        for memory in memory {
            held.memory.entry(Arc::as_ptr(&memory).cast::<()>().addr()).or_insert(memory);
        }
    }

    /// As [`Stream::hold`], what a graph refers to.
    pub(super) fn hold_graph(&self, kept: &Arc<Kept>) {
        let mut held = self.held();
        if !held.graphs.iter().any(|known| Arc::ptr_eq(known, kept)) {
            held.graphs.push(kept.clone());
        }
    }

    pub(super) fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // What is still under way may wait for a gate for ever: it is not waited for, and what it refers to is not freed. An
        // engine's stream is not asked: that would spoil a capture of it.
        if !self.owned || !matches!(self.is_idle(), Ok(true)) {
            std::mem::forget(std::mem::take(&mut *self.held()));
        }
        if !self.owned {
            return;
        }
        // SAFETY: created once. Its work goes on.
        let _ = self.context.call("cuStreamDestroy", || unsafe { sys::cuStreamDestroy_v2(self.raw) });
    }
}
