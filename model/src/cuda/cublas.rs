//! cuBLASLt: matrix products on tensor cores, by the vendor's library where the machine has it.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use libloading::Library;
use stepmesh_transport::Region;
use stepmesh_transport::cuda::{Context, DeviceMemory, Span, Stream};

use super::library::{find, open};
use crate::ModelError;

/// What names it.
pub(super) const VARIABLE: &str = "STEPMESH_CUBLASLT";
/// Its names, newest first; what `STEPMESH_CUBLASLT` names comes before them.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
/// Bytes that its kernels may use beside their operands; what its documentation advises for Hopper.
const WORKSPACE: usize = 32 << 20;

// Of cublasLt.h and library_types.h.
const COMPUTE_32F: c_int = 68;
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const DESC_TRANSA: c_int = 3;
const OP_T: c_int = 1;
const PREF_MAX_WORKSPACE: c_int = 1;

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;
type DescCreate = unsafe extern "C" fn(*mut Handle, c_int, c_int) -> c_int;
type Set = unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int;
type LayoutCreate = unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> c_int;
type Heuristic = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    c_int,
    *mut Choice,
    *mut c_int,
) -> c_int;
type Matmul = unsafe extern "C" fn(
    Handle,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *const c_void,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *mut c_void,
    Handle,
    *const Algorithm,
    *mut c_void,
    usize,
    *mut c_void,
) -> c_int;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Algorithm([u64; 8]);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Choice {
    algorithm: Algorithm,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// How one shape is multiplied.
#[derive(Clone, Copy)]
struct Plan {
    desc: Handle,
    weights: Handle,
    x: Handle,
    out: Handle,
    algorithm: Algorithm,
}

/// The library, with a workspace on a GPU. What it does on one stream at a time.
pub(super) struct CublasLt {
    handle: Handle,
    matmul: Matmul,
    heuristic: Heuristic,
    desc_create: DescCreate,
    desc_set: Set,
    layout_create: LayoutCreate,
    preference: Handle,
    destroy: Destroy,
    workspace: Span,
    plans: Mutex<HashMap<(usize, usize, usize), Plan>>,
    _library: Library,
}

// SAFETY: the library's handles may be used from any thread; plans are locked.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl CublasLt {
    /// The library, if the machine has it.
    pub(super) fn load(context: &Arc<Context>) -> Result<Option<Self>, ModelError> {
        let Ok(library) = open(VARIABLE, &NAMES) else { return Ok(None) };
        context.enter()?;
        let region = Region::new(DeviceMemory::allocate(context, WORKSPACE)?);
        let workspace = Span::new(&region, 0..WORKSPACE)?;
        let (mut handle, mut preference) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the calls are those of cublasLt.h, and so are their arguments; the library is kept.
        unsafe {
            let create: Create = find(&library, b"cublasLtCreate\0")?;
            let preference_create: Create = find(&library, b"cublasLtMatmulPreferenceCreate\0")?;
            let preference_set: Set = find(&library, b"cublasLtMatmulPreferenceSetAttribute\0")?;
            check("cublasLtCreate", create(&mut handle))?;
            check("cublasLtMatmulPreferenceCreate", preference_create(&mut preference))?;
            let most = ptr::from_ref(&WORKSPACE).cast();
            check("cublasLtMatmulPreferenceSetAttribute", preference_set(preference, PREF_MAX_WORKSPACE, most, 8))?;
            Ok(Some(Self {
                handle,
                matmul: find(&library, b"cublasLtMatmul\0")?,
                heuristic: find(&library, b"cublasLtMatmulAlgoGetHeuristic\0")?,
                desc_create: find(&library, b"cublasLtMatmulDescCreate\0")?,
                desc_set: find(&library, b"cublasLtMatmulDescSetAttribute\0")?,
                layout_create: find(&library, b"cublasLtMatrixLayoutCreate\0")?,
                preference,
                destroy: find(&library, b"cublasLtDestroy\0")?,
                workspace,
                plans: Mutex::default(),
                _library: library,
            }))
        }
    }

    /// `out` `[rows, n]` = `x` `[rows, k]` * `weights` `[n, k]`^T, all bf16, sums in f32.
    pub(super) fn multiply(
        &self,
        stream: &Stream,
        x: u64,
        weights: u64,
        out: u64,
        [rows, n, k]: [usize; 3],
    ) -> Result<(), ModelError> {
        let plan = self.plan(rows, n, k)?;
        stream.hold([self.workspace.region().memory().clone()]);
        let (one, zero) = (1.0_f32, 0.0_f32);
        let at = |address: u64| ptr::without_provenance_mut::<c_void>(address as usize);
        // SAFETY: the operands are as large as the plan's layouts say, which the caller has checked; the workspace is held.
        let status = unsafe {
            (self.matmul)(
                self.handle,
                plan.desc,
                (&raw const one).cast(),
                at(weights),
                plan.weights,
                at(x),
                plan.x,
                (&raw const zero).cast(),
                at(out),
                plan.out,
                at(out),
                plan.out,
                &plan.algorithm,
                at(self.workspace.address()),
                WORKSPACE,
                stream.raw().cast(),
            )
        };
        check("cublasLtMatmul", status)
    }

    /// Row-major matrices are column-major ones transposed: out^T = weights * x^T.
    fn plan(&self, rows: usize, n: usize, k: usize) -> Result<Plan, ModelError> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&(rows, n, k)) {
            return Ok(*plan);
        }
        // A plan's handles are few and small, and live as long as the process needs them.
        let mut desc = ptr::null_mut();
        // SAFETY: the pointers are valid, here and below.
        check("cublasLtMatmulDescCreate", unsafe { (self.desc_create)(&mut desc, COMPUTE_32F, R_32F) })?;
        // SAFETY: the attribute is 32 bits wide.
        let set = unsafe { (self.desc_set)(desc, DESC_TRANSA, ptr::from_ref(&OP_T).cast(), 4) };
        check("cublasLtMatmulDescSetAttribute", set)?;
        let layout = |high: usize, wide: usize| {
            let mut layout = ptr::null_mut();
            // SAFETY: as above.
            let status = unsafe { (self.layout_create)(&mut layout, R_16BF, high as u64, wide as u64, high as i64) };
            check("cublasLtMatrixLayoutCreate", status).map(|()| layout)
        };
        let (weights, x, out) = (layout(k, n)?, layout(k, rows)?, layout(n, rows)?);
        let (mut choice, mut found) = (Choice::default(), 0);
        // SAFETY: as above; one choice is asked for.
        let status = unsafe {
            (self.heuristic)(self.handle, desc, weights, x, out, out, self.preference, 1, &mut choice, &mut found)
        };
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        if found == 0 {
            return Err(ModelError::Unsupported { reason: format!("cuBLASLt has no product of {rows} x {n} x {k}") });
        }
        let plan = Plan { desc, weights, x, out, algorithm: choice.algorithm };
        plans.insert((rows, n, k), plan);
        Ok(plan)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: made once; streams keep the workspace, and what was launched needs no handle.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}

fn check(call: &'static str, status: c_int) -> Result<(), ModelError> {
    if status == 0 { Ok(()) } else { Err(ModelError::Library { call, status }) }
}
