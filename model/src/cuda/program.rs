//! The kernels: compiled for the GPU at hand when they are first needed, by NVRTC, which is loaded then.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule};
use libloading::Library;
use stepmesh_transport::cuda::{Context, Stream};

use super::library;
use crate::ModelError;

const SOURCE: &str = concat!(
    include_str!("kernels/prelude.cu"),
    include_str!("kernels/ptx.cu"),
    include_str!("kernels/values.cu"),
    include_str!("kernels/rows.cu"),
    include_str!("kernels/routing.cu"),
    include_str!("kernels/gemm.cu"),
    include_str!("kernels/attention.cu"),
);

/// Every kernel: its name, whether it is for bf16 activations only (or for f32 only), and its dynamic shared memory where that is
/// more than a kernel has without asking.
const KERNELS: [(&CStr, Only, i32); 28] = [
    (c"embed_f32", Only::Neither, 0),
    (c"embed_bf16", Only::Neither, 0),
    (c"rms_norm", Only::Neither, 0),
    (c"add_rms_norm", Only::Neither, 0),
    (c"silu_times", Only::Neither, 0),
    (c"combine_f32", Only::Neither, 0),
    (c"combine_bf16", Only::Neither, 0),
    (c"quantise", Only::Neither, 0),
    (c"dequantise", Only::Neither, 0),
    (c"fill", Only::Neither, 0),
    (c"fill_fp8", Only::Neither, 0),
    (c"fill_f32", Only::Neither, 0),
    (c"spin", Only::Neither, 0),
    (c"choose", Only::Neither, 0),
    (c"sort_visits", Only::Neither, 0),
    (c"gather_results", Only::Neither, 0),
    (c"rotate_and_store", Only::Neither, 0),
    (c"attend", Only::Neither, 0),
    (c"join", Only::Neither, 0),
    (c"attend_bf16", Only::Bf16, 32 * 1024 + 2 * 32 * 1024),
    (c"attend_fp8", Only::Bf16, 32 * 1024 + 32 * 1024 + 3 * 16 * 1024),
    (c"gemm_f32", Only::F32, 0),
    (c"gemm_bf16_16", Only::Bf16, 4 * (16 + 128) * 128),
    (c"gemm_bf16_64", Only::Bf16, 4 * (64 + 128) * 128),
    (c"gemm_bf16_128", Only::Bf16, 4 * (128 + 256) * 128),
    (c"gemm_fp8_16", Only::Bf16, 4 * (16 + 128) * (128 + 4)),
    (c"gemm_fp8_64", Only::Bf16, 4 * (64 + 128) * (128 + 4)),
    (c"gemm_fp8_128", Only::Bf16, 4 * (128 + 128) * (128 + 4)),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Only {
    Neither,
    F32,
    Bf16,
}

/// Machine code, of a GPU and of whether activations are bf16.
type Compiled = ((u32, bool), Vec<u8>);

/// What was compiled: once in a process.
static COMPILED: Mutex<Vec<Compiled>> = Mutex::new(Vec::new());

/// The kernels, loaded on a GPU.
pub(super) struct Program {
    context: Arc<Context>,
    module: CUmodule,
    functions: HashMap<&'static CStr, (CUfunction, u32)>,
}

// SAFETY: modules and functions may be used from any thread.
unsafe impl Send for Program {}
// SAFETY: as above.
unsafe impl Sync for Program {}

/// How a kernel is launched: blocks, threads of a block, bytes of dynamic shared memory beyond what it always has.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) grid: [usize; 3],
    pub(super) block: u32,
    pub(super) shared: usize,
}

/// What a kernel takes by value.
pub(super) trait Argument: Copy {}
impl Argument for u64 {}
impl Argument for u32 {}
impl Argument for i32 {}
impl Argument for f32 {}

/// Where an argument is.
pub(super) fn argument<T: Argument>(value: &T) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

impl Program {
    pub(super) fn load(context: &Arc<Context>, rounds: bool) -> Result<Self, ModelError> {
        let (major, minor) = context.capability()?;
        if (major, minor) < (8, 9) {
            let reason = format!("GPU {} has compute capability {major}.{minor}, 8.9 is the least", context.index());
            return Err(ModelError::Unsupported { reason });
        }
        let calls =
            [c"cuModuleLoadData", c"cuModuleGetFunction", c"cuModuleUnload", c"cuFuncSetAttribute", c"cuLaunchKernel"];
        if let Some(missing) = calls.into_iter().find(|name| !context.has_entry_point(name)) {
            let reason = format!("the driver has no {}", missing.to_string_lossy());
            return Err(ModelError::Kernels { reason });
        }
        let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (context.index(), rounds);
        if !compiled.iter().any(|(known, _)| *known == key) {
            compiled.push((key, compile(major * 10 + minor, rounds)?));
        }
        let image =
            compiled.iter().find(|(known, _)| *known == key).map(|(_, image)| image.as_slice()).unwrap_or_default();
        let mut module = ptr::null_mut();
        // SAFETY: the pointer is valid, the image is what the compiler made.
        context.call("cuModuleLoadData", || unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) })?;
        let mut program = Self { context: context.clone(), module, functions: HashMap::new() };
        let wanted = KERNELS.iter().filter(|(_, only, _)| *only != if rounds { Only::F32 } else { Only::Bf16 });
        for (name, _, shared) in wanted {
            let mut function = ptr::null_mut();
            // SAFETY: the module was just loaded, the name is a constant string.
            let find = || unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) };
            context.call("cuModuleGetFunction", find)?;
            if *shared > 0 {
                let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function was just found.
                let allow = || unsafe { sys::cuFuncSetAttribute(function, attribute, *shared) };
                context.call("cuFuncSetAttribute", allow)?;
            }
            program.functions.insert(name, (function, *shared as u32));
        }
        Ok(program)
    }

    /// Puts a kernel on a stream.
    ///
    /// # Safety
    /// `arguments` are those of the kernel's declaration, in order and kind; what they point to is kept until it has run.
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        name: &'static CStr,
        shape: Shape,
        arguments: &mut [*mut c_void],
    ) -> Result<(), ModelError> {
        let Some((function, shared)) = self.functions.get(name) else {
            return Err(ModelError::Kernels { reason: format!("there is no {}", name.to_string_lossy()) });
        };
        let [x, y, z] = shape.grid.map(|blocks| blocks as u32);
        if x * y * z == 0 {
            return Ok(());
        }
        let shared = shared + shape.shared as u32;
        // SAFETY: the caller's promise; the function is loaded on the stream's GPU.
        let launch = || unsafe {
            let (stream, arguments) = (stream.raw(), arguments.as_mut_ptr());
            sys::cuLaunchKernel(*function, x, y, z, shape.block, 1, 1, shared, stream, arguments, ptr::null_mut())
        };
        Ok(self.context.call("cuLaunchKernel", launch)?)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: loaded once; whoever launches keeps this until the streams are idle.
        let _ = self.context.call("cuModuleUnload", || unsafe { sys::cuModuleUnload(self.module) });
    }
}

type Handle = *mut c_void;

/// What names NVRTC.
pub(super) const VARIABLE: &str = "STEPMESH_NVRTC";
/// NVRTC's names, newest first; what `STEPMESH_NVRTC` names comes before them.
const NVRTC: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// The kernels' machine code for GPUs of a compute capability, such as 90.
pub(super) fn compile(capability: u32, rounds: bool) -> Result<Vec<u8>, ModelError> {
    library::open_beside(VARIABLE, "libnvrtc-builtins.so");
    let library = library::open(VARIABLE, &NVRTC).map_err(|reason| ModelError::Kernels {
        reason: format!(
            "NVRTC is not found ({reason}); install it (pip: nvidia-cuda-nvrtc), and name it with {VARIABLE}"
        ),
    })?;
    // SAFETY: the calls are those of nvrtc.h, and so are their arguments; the strings outlive them.
    unsafe { compile_with(&library, capability, rounds) }
}

/// # Safety
/// `library` is NVRTC.
unsafe fn compile_with(library: &Library, capability: u32, rounds: bool) -> Result<Vec<u8>, ModelError> {
    type Create = unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int;
    type Compile = unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int;
    type Size = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
    type Get = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;
    let wrong = |call: &'static str, status| ModelError::Library { call, status };
    let source = CString::new(SOURCE).map_err(|error| ModelError::Kernels { reason: error.to_string() })?;
    let options = [format!("--gpu-architecture=sm_{capability}"), format!("-DROUNDS={}", i32::from(rounds))];
    let options = options.map(|option| CString::new(option).unwrap_or_default());
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    // SAFETY: the caller's promise; all pointers are valid.
    unsafe {
        let create = library::find::<Create>(library, b"nvrtcCreateProgram\0")?;
        let compile = library::find::<Compile>(library, b"nvrtcCompileProgram\0")?;
        let log_size = library::find::<Size>(library, b"nvrtcGetProgramLogSize\0")?;
        let log = library::find::<Get>(library, b"nvrtcGetProgramLog\0")?;
        let size = library::find::<Size>(library, b"nvrtcGetCUBINSize\0")?;
        let get = library::find::<Get>(library, b"nvrtcGetCUBIN\0")?;
        let (mut program, none) = (ptr::null_mut(), ptr::null());
        match create(&mut program, source.as_ptr(), c"stepmesh.cu".as_ptr(), 0, none, none) {
            0 => {}
            status => return Err(wrong("nvrtcCreateProgram", status)),
        }
        let compiled = compile(program, options.len() as c_int, options.as_ptr());
        let mut bytes = 0;
        if compiled != 0 {
            let _ = log_size(program, &mut bytes);
            let mut text = vec![0_u8; bytes.max(1)];
            let _ = log(program, text.as_mut_ptr().cast());
            let reason = String::from_utf8_lossy(&text).trim_end_matches('\0').trim().to_owned();
            return Err(ModelError::Kernels { reason: format!("error {compiled}: {reason}") });
        }
        match size(program, &mut bytes) {
            0 => {}
            status => return Err(wrong("nvrtcGetCUBINSize", status)),
        }
        let mut image = vec![0_u8; bytes];
        match get(program, image.as_mut_ptr().cast()) {
            0 => Ok(image),
            status => Err(wrong("nvrtcGetCUBIN", status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the machine that has the compiler: no GPU is needed.
    #[test]
    fn every_kernel_compiles_for_every_gpu_that_is_supported() {
        for capability in [89, 90] {
            for rounds in [false, true] {
                match compile(capability, rounds) {
                    Ok(image) => assert!(image.starts_with(b"\x7fELF"), "sm_{capability}"),
                    // A machine without the compiler must not be asked for it by name.
                    Err(error) if std::env::var_os(VARIABLE).is_none() => {
                        assert!(error.to_string().contains("NVRTC is not found"), "{error}");
                        eprintln!("not compiled: {error}");
                    }
                    Err(error) => panic!("sm_{capability}: {error}"),
                }
            }
        }
    }
}
