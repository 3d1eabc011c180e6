//! The driver's library: whether it is there, whether it has what is needed, and what its answers mean.

use super::CudaError;
use cudarc::driver::sys::{self, CUresult};
use std::ffi::CStr;
use std::sync::OnceLock;

/// The oldest driver, as `cuDriverGetVersion` counts: stream memory operations of their second version, dma-buf.
const OLDEST: i32 = 12_000;

/// Every entry point that is called; without one of them `cudarc` would panic.
const ENTRY_POINTS: [&CStr; 34] = [
    c"cuInit",
    c"cuDriverGetVersion",
    c"cuDeviceGetCount",
    c"cuDeviceGet",
    c"cuDeviceGetName",
    c"cuDeviceGetAttribute",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuCtxSetCurrent",
    c"cuGetErrorName",
    c"cuMemGetInfo_v2",
    c"cuMemAlloc_v2",
    c"cuMemFree_v2",
    c"cuMemHostAlloc",
    c"cuMemFreeHost",
    c"cuMemHostGetDevicePointer_v2",
    c"cuMemHostRegister_v2",
    c"cuMemHostUnregister",
    c"cuMemcpyAsync",
    c"cuPointerGetAttribute",
    c"cuMemGetHandleForAddressRange",
    c"cuIpcGetMemHandle",
    c"cuIpcOpenMemHandle_v2",
    c"cuIpcCloseMemHandle",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamQuery",
    c"cuStreamBatchMemOp_v2",
    c"cuStreamBeginCapture_v2",
    c"cuStreamEndCapture",
    c"cuStreamGetCaptureInfo_v2",
    c"cuGraphInstantiateWithFlags",
    c"cuGraphLaunch",
    c"cuGraphExecDestroy",
];

/// Loads and initialises the driver, once in a process.
pub(super) fn load() -> Result<(), CudaError> {
    static LOADED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    LOADED.get_or_init(initialise).clone()
}

fn initialise() -> Result<(), CudaError> {
    // SAFETY: loading the driver's library runs its initialisers, which is what the library is for.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // SAFETY: the library was just found to be there.
    let library = unsafe { sys::culib() };
    // SAFETY: looked up only, and as an untyped address.
    let has = |name: &CStr| unsafe { library.get::<*const ()>(name.to_bytes_with_nul()) }.is_ok();
    let mut version = 0;
    if has(c"cuDriverGetVersion") {
        // SAFETY: it is there, and the pointer is valid.
        let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
    }
    let old =
        |missing| Err(CudaError::TooOld { found: format!("{}.{}", version / 1000, version % 1000 / 10), missing });
    if let Some(missing) = ENTRY_POINTS.iter().find(|name| !has(name)) {
        return old(format!("it has no {}", missing.to_string_lossy()));
    }
    if version < OLDEST {
        return old(format!("{} is the least", OLDEST / 1000));
    }
    // SAFETY: it is there; it may be called any number of times.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => Ok(()),
        CUresult::CUDA_ERROR_NO_DEVICE => Err(CudaError::NoDevice { index: 0, count: 0 }),
        error => Err(CudaError::Refused { index: 0, call: "cuInit", name: name(error) }),
    }
}

/// The version of the driver, which was loaded.
pub(super) fn version() -> i32 {
    let mut version = 0;
    // SAFETY: the entry point was found to be there; the pointer is valid.
    let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
    version
}

/// Whether the driver, which was loaded, has an entry point.
pub(super) fn has(name: &CStr) -> bool {
    // SAFETY: the library is there; looked up only, and as an untyped address.
    unsafe { sys::culib().get::<*const ()>(name.to_bytes_with_nul()) }.is_ok()
}

/// The driver's name for an answer.
pub(super) fn name(error: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the driver is loaded; what it gives is a constant string, or nothing.
    let known = unsafe { sys::cuGetErrorName(error, &mut text) };
    if known != CUresult::CUDA_SUCCESS || text.is_null() {
        return format!("error {}", error as u32);
    }
    // SAFETY: a constant string of the driver's.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Whether nothing on the device can be used any more.
fn is_lost(error: CUresult) -> bool {
    matches!(
        error,
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}

/// What an answer of `call` means.
pub(super) fn check(index: u32, call: &'static str, answer: CUresult) -> Result<(), CudaError> {
    match answer {
        CUresult::CUDA_SUCCESS => Ok(()),
        error if is_lost(error) => Err(CudaError::Lost { index, call, name: name(error) }),
        error => Err(CudaError::Refused { index, call, name: name(error) }),
    }
}
