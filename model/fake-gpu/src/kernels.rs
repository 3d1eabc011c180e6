//! Modules, which are libraries that [`compiler`](crate::compiler) made, and the launch of what is in them.

use cudarc::driver::sys::{CUfunction, CUmodule, CUresult, CUstream};
use libloading::Library;
use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, PoisonError};

/// A kernel's entry: grid, threads of a block, bytes of shared memory, arguments.
type Entry = unsafe extern "C" fn(*const c_uint, c_uint, c_uint, *const *const c_void);
/// How many arguments it has, and how long each is.
type Sizes = unsafe extern "C" fn(*mut usize) -> usize;

struct Function {
    entry: Entry,
    sizes: Vec<usize>,
    /// The code stays as long as anything may still run.
    library: Arc<Library>,
}

/// One kernel runs at a time: what its threads share is the library's.
static RUNNING: Mutex<()> = Mutex::new(());

const INVALID: CUresult = CUresult::CUDA_ERROR_INVALID_VALUE;

/// An image is the path of a library.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(out: *mut CUmodule, image: *const c_void) -> CUresult {
    // SAFETY: the driver's contract: an image that the compiler made, which ends with a zero.
    let path = unsafe { CStr::from_ptr(image.cast()) };
    // SAFETY: the library is the compiler's; it has no initialisers of its own.
    match unsafe { Library::new(OsStr::from_bytes(path.to_bytes())) } {
        Ok(library) => {
            // SAFETY: the caller's pointer.
            unsafe { out.write(Box::into_raw(Box::new(Arc::new(library))).cast()) };
            CUresult::CUDA_SUCCESS
        }
        Err(_) => CUresult::CUDA_ERROR_INVALID_IMAGE,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleUnload(module: CUmodule) -> CUresult {
    // SAFETY: it came from `cuModuleLoadData`, and is unloaded once.
    drop(unsafe { Box::from_raw(module.cast::<Arc<Library>>()) });
    CUresult::CUDA_SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(out: *mut CUfunction, module: CUmodule, name: *const c_char) -> CUresult {
    // SAFETY: the driver's contract: a string, and what came from `cuModuleLoadData`.
    let (name, library) = unsafe { (CStr::from_ptr(name).to_string_lossy(), &*module.cast::<Arc<Library>>()) };
    // SAFETY: the compiler made both for every kernel.
    let found = unsafe {
        let entry = library.get::<Entry>(format!("run_{name}").as_bytes());
        (entry.map(|entry| *entry), library.get::<Sizes>(format!("sizes_{name}").as_bytes()).map(|sizes| *sizes))
    };
    let (Ok(entry), Ok(sizes_of)) = found else { return CUresult::CUDA_ERROR_NOT_FOUND };
    let mut sizes = vec![0; 64];
    // SAFETY: no kernel has so many arguments.
    let count = unsafe { sizes_of(sizes.as_mut_ptr()) };
    sizes.truncate(count);
    // A function is the module's and is not given back: a test has a few.
    let function = Box::new(Function { entry, sizes, library: library.clone() });
    // SAFETY: the caller's pointer.
    unsafe { out.write(Box::into_raw(function).cast()) };
    CUresult::CUDA_SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncSetAttribute(_function: CUfunction, _attribute: c_int, _value: c_int) -> CUresult {
    CUresult::CUDA_SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: CUfunction,
    x: c_uint,
    y: c_uint,
    z: c_uint,
    threads: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared: c_uint,
    stream: CUstream,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> CUresult {
    if x * y * z == 0 || threads == 0 || threads > 1024 || threads_y * threads_z != 1 {
        return INVALID;
    }
    // SAFETY: it came from `cuModuleGetFunction`.
    let Function { entry, sizes, library } = unsafe { &*function.cast::<Function>() };
    // Of words, for alignment.
    let copies: Vec<Vec<u64>> = sizes
        .iter()
        .enumerate()
        .map(|(index, size)| {
            let mut copy = vec![0_u64; size.div_ceil(8)];
            // SAFETY: the driver's contract: so many arguments, of these lengths.
            unsafe {
                std::ptr::copy_nonoverlapping((*arguments.add(index)).cast(), copy.as_mut_ptr().cast::<u8>(), *size)
            };
            copy
        })
        .collect();
    let (entry, library) = (*entry, library.clone());
    let launch = move || {
        let _one = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let _code = &library;
        let arguments: Vec<*const c_void> = copies.iter().map(|copy| copy.as_ptr().cast()).collect();
        // SAFETY: what the compiler made for the kernel, with its arguments; memory that they name stays by the driver's contract.
        unsafe { entry([x, y, z].as_ptr(), threads, shared, arguments.as_ptr()) };
    };
    // SAFETY: the driver's contract.
    unsafe { stepmesh_fake_cuda::put(stream, Arc::new(launch)) };
    CUresult::CUDA_SUCCESS
}
