//! One GPU, as this process uses it.

use super::driver::{check, load};
use super::{CudaError, driver};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute as Attribute, CUresult};
use std::ffi::CStr;
use std::fmt;
use std::ptr;
use std::sync::Arc;

/// The scope in which writes of network devices are ordered before the driver's own: at least the device's own, without
/// which a wait has to flush them. (`CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER`.)
const ORDERED_FOR_OWNER: i32 = 100;

/// A GPU and its primary context, which everybody in a process shares: the runtime's memory is the engine's, too. What is
/// made in it keeps it.
pub struct Context {
    index: u32,
    device: CUdevice,
    raw: CUcontext,
    name: String,
    exports_dma_buf: bool,
    flushes: bool,
}

// SAFETY: a context may be made current on any thread, on several at once.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context(GPU {}: {})", self.index, self.name)
    }
}

impl Context {
    /// GPU `index`, as the driver counts those that are visible.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::TooOld`], [`CudaError::NoDevice`]; [`CudaError::Incapable`] if it has no 64-bit
    /// stream memory operations, or neither orders nor flushes what network devices write.
    pub fn open(index: u32) -> Result<Arc<Self>, CudaError> {
        load()?;
        let (mut count, mut device) = (0, 0);
        // SAFETY: the driver is loaded; the pointer is valid.
        check(index, "cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
        let count = count.max(0) as u32;
        if index >= count {
            return Err(CudaError::NoDevice { index, count });
        }
        // SAFETY: as above.
        check(index, "cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, index as i32) })?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: as above.
            check(index, "cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
            Ok(value)
        };
        if attribute(Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS)? == 0 {
            return Err(CudaError::Incapable { index, what: "signal by 64-bit stream memory operations" });
        }
        let ordered = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING)? >= ORDERED_FOR_OWNER;
        if !ordered && attribute(Attribute::CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES)? == 0 {
            return Err(CudaError::Incapable {
                index,
                what: "order what network devices write before what follows a wait",
            });
        }
        let exports_dma_buf = attribute(Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)? != 0;
        let mut name = [0; 128];
        // SAFETY: as above; so long is the buffer.
        check(index, "cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 127, device) })?;
        // SAFETY: the last byte is zero in any case.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let mut raw = ptr::null_mut();
        // SAFETY: as above; released when this is dropped.
        check(index, "cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device) })?;
        Ok(Arc::new(Self { index, device, raw, name, exports_dma_buf, flushes: !ordered }))
    }

    /// Its number.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether its memory can be exported for network devices; if not, a kernel module has to resolve its addresses.
    pub fn exports_dma_buf(&self) -> bool {
        self.exports_dma_buf
    }

    /// Whether a stream has to pass a gate, whose wait flushes them, before it sees what network devices have written.
    pub fn flushes(&self) -> bool {
        self.flushes
    }

    /// The version of CUDA that the driver is for, such as `13.0`.
    pub fn driver_version(&self) -> String {
        let version = driver::version();
        format!("{}.{}", version / 1000, version % 1000 / 10)
    }

    /// Its compute capability, as (major, minor).
    ///
    /// # Errors
    /// The driver refuses.
    pub fn capability(&self) -> Result<(u32, u32), CudaError> {
        let major = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        Ok((major as u32, self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32))
    }

    /// What the driver says of one of its attributes.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn attribute(&self, attribute: Attribute) -> Result<i32, CudaError> {
        let mut value = 0;
        let device = self.device;
        // SAFETY: the pointer is valid.
        self.call("cuDeviceGetAttribute", || unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
        Ok(value)
    }

    /// Whether the driver has an entry point that this crate does not call itself: without it, a call would panic.
    pub fn has_entry_point(&self, name: &CStr) -> bool {
        driver::has(name)
    }

    /// Makes it the calling thread's.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained for as long as this lives.
        check(self.index, "cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    /// Makes it the calling thread's, calls the driver, and says what the answer means: for clients that call it themselves.
    ///
    /// # Errors
    /// [`CudaError::Lost`], [`CudaError::Refused`].
    pub fn call(&self, name: &'static str, call: impl FnOnce() -> CUresult) -> Result<(), CudaError> {
        self.enter()?;
        check(self.index, name, call())
    }

    /// As [`Context::call`], for those whose answers are told apart: the driver's own name for a refusal.
    pub(super) fn ask(
        &self,
        name: &'static str,
        call: impl FnOnce() -> CUresult,
    ) -> Result<Result<(), String>, CudaError> {
        self.enter()?;
        match call() {
            CUresult::CUDA_SUCCESS => Ok(Ok(())),
            error => match check(self.index, name, error) {
                Err(lost @ CudaError::Lost { .. }) => Err(lost),
                _ => Ok(Err(driver::name(error))),
            },
        }
    }

    /// Bytes that are free, and in all.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are valid.
        self.call("cuMemGetInfo", || unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free, total))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`; everything made in it held it and is gone.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
