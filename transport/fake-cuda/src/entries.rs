//! The driver's entry points.

use crate::machine::{self, Kind, MEMORY, bias};
use crate::stream::{self, Operation, Stream, word};
use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdeviceptr, CUgraph, CUgraphExec, CUipcMemHandle, CUmemorytype, CUresult, CUstream,
    CUstreamBatchMemOpParams, CUstreamBatchMemOpType as Kinds, CUstreamCaptureMode, CUstreamCaptureStatus as Capture,
};
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::{FromRawFd, OwnedFd};

use CUresult::{
    CUDA_ERROR_INVALID_CONTEXT as NO_CONTEXT, CUDA_ERROR_INVALID_DEVICE as NO_DEVICE,
    CUDA_ERROR_INVALID_VALUE as INVALID, CUDA_SUCCESS as SUCCESS,
};

/// Whether the driver was initialised, by process; and the calling thread's context.
static READY: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
thread_local! {
    static CURRENT: Cell<bool> = const { Cell::new(false) };
}

/// The one context: any address that is not null.
fn context() -> CUcontext {
    std::ptr::without_provenance_mut(0x1000)
}

/// What an entry point was told to fail with, or what its body says.
fn entry(name: &str, body: impl FnOnce() -> Result<(), CUresult>) -> CUresult {
    match machine::get().failure(name) {
        Some(error) => error,
        None => body().err().unwrap_or(SUCCESS),
    }
}

/// As [`entry`], for those that need a context.
fn within(name: &str, body: impl FnOnce() -> Result<(), CUresult>) -> CUresult {
    entry(name, || if CURRENT.get() { body() } else { Err(NO_CONTEXT) })
}

/// # Safety
/// `to` is null or may be written.
unsafe fn give<T>(to: *mut T, value: T) -> Result<(), CUresult> {
    if to.is_null() {
        return Err(INVALID);
    }
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuInit(_flags: c_uint) -> CUresult {
    entry("cuInit", || {
        READY.store(true, std::sync::atomic::Ordering::Release);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> CUresult {
    // SAFETY: the driver's contract, here and below: pointers are valid or null.
    entry("cuDriverGetVersion", || unsafe { give(version, machine::get().version()) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> CUresult {
    // SAFETY: as above.
    entry("cuDeviceGetCount", || unsafe { give(count, 1) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int) -> CUresult {
    // SAFETY: as above.
    entry("cuDeviceGet", || if ordinal == 0 { unsafe { give(device, 0) } } else { Err(NO_DEVICE) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: CUdevice) -> CUresult {
    entry("cuDeviceGetName", || {
        let bytes = c"Fake GPU".to_bytes_with_nul();
        if (len as usize) < bytes.len() {
            return Err(INVALID);
        }
        // SAFETY: as above; the name fits.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), name, bytes.len()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: CUdevice) -> CUresult {
    // SAFETY: as above.
    entry("cuDeviceGetAttribute", || unsafe { give(value, machine::get().attribute(attribute)) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(out: *mut CUcontext, _device: CUdevice) -> CUresult {
    // SAFETY: as above.
    entry("cuDevicePrimaryCtxRetain", || unsafe { give(out, context()) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: CUdevice) -> CUresult {
    entry("cuDevicePrimaryCtxRelease_v2", || Ok(()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSetCurrent(context: CUcontext) -> CUresult {
    entry("cuCtxSetCurrent", || {
        CURRENT.set(!context.is_null());
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(_error: CUresult, name: *mut *const c_char) -> CUresult {
    // SAFETY: as above.
    entry("cuGetErrorName", || unsafe { give(name, c"FAKE_ERROR".as_ptr()) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CUresult {
    // SAFETY: as above.
    within("cuMemGetInfo_v2", || unsafe {
        give(free, MEMORY - machine::get().allocated())?;
        give(total, MEMORY)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(out: *mut CUdeviceptr, bytes: usize) -> CUresult {
    // SAFETY: as above.
    within("cuMemAlloc_v2", || unsafe { give(out, machine::get().allocate(bytes)? as u64 + bias()) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFree_v2(address: CUdeviceptr) -> CUresult {
    within("cuMemFree_v2", || {
        let host = address.checked_sub(bias()).ok_or(INVALID)?;
        machine::get().release(host as usize, |kind| matches!(kind, Kind::Device(_)))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(out: *mut *mut c_void, bytes: usize, _flags: c_uint) -> CUresult {
    within("cuMemHostAlloc", || {
        let len = bytes.checked_next_multiple_of(4096).filter(|len| *len > 0).ok_or(INVALID)?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if memory == libc::MAP_FAILED {
            return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        }
        machine::get().keep(memory as usize, len, Kind::Host)?;
        // SAFETY: as above.
        unsafe { give(out, memory) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFreeHost(memory: *mut c_void) -> CUresult {
    within("cuMemFreeHost", || machine::get().release(memory as usize, |kind| matches!(kind, Kind::Host)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostRegister_v2(memory: *mut c_void, bytes: usize, _flags: c_uint) -> CUresult {
    within("cuMemHostRegister_v2", || machine::get().keep(memory as usize, bytes, Kind::Registered))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostUnregister(memory: *mut c_void) -> CUresult {
    within("cuMemHostUnregister", || machine::get().release(memory as usize, |kind| matches!(kind, Kind::Registered)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostGetDevicePointer_v2(
    out: *mut CUdeviceptr,
    memory: *mut c_void,
    _flags: c_uint,
) -> CUresult {
    within("cuMemHostGetDevicePointer_v2", || {
        let is_host = |_, allocation: &machine::Allocation| matches!(allocation.kind, Kind::Host | Kind::Registered);
        if machine::get().find(memory as usize, is_host) != Some(true) {
            return Err(INVALID);
        }
        // SAFETY: as above.
        unsafe { give(out, memory as u64 + bias()) }
    })
}

/// The kind of memory is all that it knows of an address.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuPointerGetAttribute(out: *mut c_void, _attribute: c_int, address: CUdeviceptr) -> CUresult {
    within("cuPointerGetAttribute", || {
        let host = address.checked_sub(bias()).unwrap_or(address);
        let kind = machine::get().find(host as usize, |_, allocation| match allocation.kind {
            Kind::Host | Kind::Registered => CUmemorytype::CU_MEMORYTYPE_HOST,
            Kind::Device(_) | Kind::Opened => CUmemorytype::CU_MEMORYTYPE_DEVICE,
        });
        // SAFETY: as above.
        unsafe { give(out.cast(), kind.ok_or(INVALID)? as u32) }
    })
}

/// Process, descriptor, length.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuIpcGetMemHandle(out: *mut CUipcMemHandle, address: CUdeviceptr) -> CUresult {
    within("cuIpcGetMemHandle", || {
        let host = address.checked_sub(bias()).ok_or(INVALID)? as usize;
        let found =
            machine::get().find(host, |_, allocation| Some((machine::descriptor(&allocation.kind)?, allocation.len)));
        let (fd, len) = found.flatten().ok_or(INVALID)?;
        let mut reserved = [0; 64];
        let words = [u64::from(std::process::id()), fd as u64, len as u64];
        for (byte, value) in reserved.iter_mut().zip(words.iter().flat_map(|word| word.to_le_bytes())) {
            *byte = value as c_char;
        }
        // SAFETY: as above.
        unsafe { give(out, CUipcMemHandle { reserved }) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuIpcOpenMemHandle_v2(out: *mut CUdeviceptr, handle: CUipcMemHandle, _flags: c_uint) -> CUresult {
    within("cuIpcOpenMemHandle_v2", || {
        let word = |index: usize| {
            let bytes = std::array::from_fn(|byte| handle.reserved[index * 8 + byte] as u8);
            u64::from_le_bytes(bytes)
        };
        let (process, fd, len) = (word(0), word(1), word(2) as usize);
        // The exporter cannot open its own handle.
        if process == u64::from(std::process::id()) {
            return Err(NO_CONTEXT);
        }
        let path = format!("/proc/{process}/fd/{fd}\0");
        // SAFETY: a string that ends with a zero.
        let raw = unsafe { libc::open(path.as_ptr().cast(), libc::O_RDWR | libc::O_CLOEXEC) };
        if raw < 0 {
            return Err(CUresult::CUDA_ERROR_MAP_FAILED);
        }
        // SAFETY: the descriptor that was just made.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let host = machine::map(raw, len)?;
        drop(fd);
        machine::get().keep(host, len, Kind::Opened)?;
        // SAFETY: as above.
        unsafe { give(out, host as u64 + bias()) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuIpcCloseMemHandle(address: CUdeviceptr) -> CUresult {
    within("cuIpcCloseMemHandle", || {
        let host = address.checked_sub(bias()).ok_or(INVALID)?;
        machine::get().release(host as usize, |kind| matches!(kind, Kind::Opened))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetHandleForAddressRange(
    handle: *mut c_void,
    address: CUdeviceptr,
    size: usize,
    _kind: c_uint,
    _flags: c_ulonglong,
) -> CUresult {
    within("cuMemGetHandleForAddressRange", || {
        let host = address.checked_sub(bias()).ok_or(INVALID)? as usize;
        if !host.is_multiple_of(4096) || !size.is_multiple_of(4096) || size == 0 {
            return Err(INVALID);
        }
        let found = machine::get().find(host, |start, allocation| {
            let fits = host + size <= start + allocation.len;
            machine::descriptor(&allocation.kind).filter(|_| fits)
        });
        let fd = found.flatten().ok_or(INVALID)?;
        // SAFETY: the descriptor is the allocation's, and open.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
        // SAFETY: as above; of this kind the handle is an `int`.
        unsafe { give(handle.cast::<c_int>(), copy) }
    })
}

/// # Safety
/// `stream` came from `cuStreamCreate` and was not destroyed, or is null.
pub(crate) unsafe fn stream_of<'a>(stream: CUstream) -> &'a Stream {
    if stream.is_null() {
        return stream::default();
    }
    // SAFETY: the caller's promise.
    unsafe { &*stream.cast::<Stream>() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(out: *mut CUstream, _flags: c_uint) -> CUresult {
    // SAFETY: as above.
    within("cuStreamCreate", || unsafe { give(out, Box::into_raw(Box::new(Stream::start())).cast()) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamDestroy_v2(stream: CUstream) -> CUresult {
    within("cuStreamDestroy_v2", || {
        if stream.is_null() {
            return Err(INVALID);
        }
        // SAFETY: it came from `cuStreamCreate`; what it holds still goes on, as its thread has it.
        drop(unsafe { Box::from_raw(stream.cast::<Stream>()) });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamQuery(stream: CUstream) -> CUresult {
    within("cuStreamQuery", || {
        // SAFETY: as above.
        let stream = unsafe { stream_of(stream) };
        if stream.is_capturing() {
            return Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        if stream.is_idle() {
            return Ok(());
        }
        // The caller asks again and again, and the stream's thread may want the processor.
        std::thread::sleep(std::time::Duration::from_micros(20));
        Err(CUresult::CUDA_ERROR_NOT_READY)
    })
}

fn add(name: &str, stream: CUstream, operations: impl FnOnce() -> Result<Vec<Operation>, CUresult>) -> CUresult {
    within(name, || {
        // SAFETY: as above.
        unsafe { stream_of(stream) }.add(operations()?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyAsync(to: CUdeviceptr, from: CUdeviceptr, len: usize, stream: CUstream) -> CUresult {
    add("cuMemcpyAsync", stream, || {
        let machine = machine::get();
        Ok(vec![Operation::Copy {
            to: machine.reach(to, len)? as usize,
            from: machine.reach(from, len)? as usize,
            len,
        }])
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD8Async(to: CUdeviceptr, value: u8, len: usize, stream: CUstream) -> CUresult {
    add("cuMemsetD8Async", stream, || {
        Ok(vec![Operation::Set { to: machine::get().reach(to, len)? as usize, value, len }])
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamWriteValue64_v2(
    stream: CUstream,
    address: CUdeviceptr,
    value: u64,
    _flags: c_uint,
) -> CUresult {
    add("cuStreamWriteValue64_v2", stream, || Ok(vec![Operation::Write { to: word(address, 8)?, value, wide: true }]))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamWaitValue64_v2(
    stream: CUstream,
    address: CUdeviceptr,
    value: u64,
    flags: c_uint,
) -> CUresult {
    add("cuStreamWaitValue64_v2", stream, || {
        Ok(vec![Operation::Wait { at: word(address, 8)?, value, wide: true, flags }])
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamBatchMemOp_v2(
    stream: CUstream,
    count: c_uint,
    operations: *mut CUstreamBatchMemOpParams,
    _flags: c_uint,
) -> CUresult {
    add("cuStreamBatchMemOp_v2", stream, || {
        if count == 0 || count >= 256 || operations.is_null() {
            return Err(INVALID);
        }
        // SAFETY: as above: so many of them.
        let operations = unsafe { std::slice::from_raw_parts(operations, count as usize) };
        let convert = |operation: &CUstreamBatchMemOpParams| {
            // SAFETY: the kind is the first field of every variant, and says which one it is.
            unsafe {
                match operation.operation {
                    Kinds::CU_STREAM_MEM_OP_WRITE_VALUE_64 => {
                        let write = operation.writeValue;
                        Ok(Operation::Write {
                            to: word(write.address, 8)?,
                            value: write.__bindgen_anon_1.value64,
                            wide: true,
                        })
                    }
                    Kinds::CU_STREAM_MEM_OP_WAIT_VALUE_64 => {
                        let wait = operation.waitValue;
                        let (value, flags) = (wait.__bindgen_anon_1.value64, wait.flags);
                        Ok(Operation::Wait { at: word(wait.address, 8)?, value, wide: true, flags })
                    }
                    Kinds::CU_STREAM_MEM_OP_WRITE_VALUE_32 => {
                        let write = operation.writeValue;
                        let value = u64::from(write.__bindgen_anon_1.value);
                        Ok(Operation::Write { to: word(write.address, 4)?, value, wide: false })
                    }
                    Kinds::CU_STREAM_MEM_OP_WAIT_VALUE_32 => {
                        let wait = operation.waitValue;
                        let (value, flags) = (u64::from(wait.__bindgen_anon_1.value), wait.flags);
                        Ok(Operation::Wait { at: word(wait.address, 4)?, value, wide: false, flags })
                    }
                    _ => Err(CUresult::CUDA_ERROR_NOT_SUPPORTED),
                }
            }
        };
        operations.iter().map(convert).collect()
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamBeginCapture_v2(stream: CUstream, _mode: CUstreamCaptureMode) -> CUresult {
    within("cuStreamBeginCapture_v2", || {
        if stream.is_null() {
            return Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        // SAFETY: as above.
        match unsafe { stream_of(stream) }.begin_capture() {
            SUCCESS => Ok(()),
            error => Err(error),
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph) -> CUresult {
    within("cuStreamEndCapture", || {
        // SAFETY: as above.
        let captured = unsafe { stream_of(stream) }.end_capture().ok_or(CUresult::CUDA_ERROR_ILLEGAL_STATE)?;
        // SAFETY: as above.
        unsafe { give(graph, Box::into_raw(Box::new(captured)).cast()) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamGetCaptureInfo_v2(
    stream: CUstream,
    status: *mut Capture,
    id: *mut u64,
    _graph: *mut CUgraph,
    _dependencies: *mut *const c_void,
    _count: *mut usize,
) -> CUresult {
    within("cuStreamGetCaptureInfo_v2", || {
        // SAFETY: as above.
        let capture = unsafe { stream_of(stream) }.capture_id();
        let active = Capture::CU_STREAM_CAPTURE_STATUS_ACTIVE;
        let answer = if capture.is_some() { active } else { Capture::CU_STREAM_CAPTURE_STATUS_NONE };
        // SAFETY: the caller's pointers.
        unsafe { give(status, answer) }?;
        // SAFETY: as above.
        unsafe { give(id, capture.unwrap_or_default()) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(
    out: *mut CUgraphExec,
    graph: CUgraph,
    _flags: c_ulonglong,
) -> CUresult {
    within("cuGraphInstantiateWithFlags", || {
        // SAFETY: it came from `cuStreamEndCapture`.
        let operations = unsafe { &*graph.cast::<Vec<Operation>>() }.clone();
        // SAFETY: as above.
        unsafe { give(out, Box::into_raw(Box::new(operations)).cast()) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphLaunch(graph: CUgraphExec, stream: CUstream) -> CUresult {
    // SAFETY: it came from `cuGraphInstantiateWithFlags`.
    add("cuGraphLaunch", stream, || Ok(unsafe { &*graph.cast::<Vec<Operation>>() }.clone()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphDestroy(graph: CUgraph) -> CUresult {
    entry("cuGraphDestroy", || {
        // SAFETY: it came from `cuStreamEndCapture`, and is destroyed once.
        drop(unsafe { Box::from_raw(graph.cast::<Vec<Operation>>()) });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphExecDestroy(graph: CUgraphExec) -> CUresult {
    entry("cuGraphExecDestroy", || {
        // SAFETY: it came from `cuGraphInstantiateWithFlags`, and is destroyed once.
        drop(unsafe { Box::from_raw(graph.cast::<Vec<Operation>>()) });
        Ok(())
    })
}
