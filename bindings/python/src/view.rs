//! A tensor of the caller's: where its bytes are, and what they are. PyTorch's on the CPU, whatever has a buffer (NumPy),
//! whatever speaks DLPack (JAX).

use crate::dtype;
use crate::error::Failure;
use crate::tensor::{CPU, CUDA, DlManaged, DlTensor, LEGACY};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use pyo3::{ffi, intern};
use std::ffi::{CStr, c_char, c_int, c_void};
use stepmesh_embed::MAX_DIMENSIONS;
use stepmesh_proto::Dtype;

/// `Py_buffer`. In the limited API since Python 3.11, and laid out so since 3.0: 3.10 exports the calls, too.
#[repr(C)]
struct RawBuffer {
    data: *mut c_void,
    object: *mut ffi::PyObject,
    bytes: isize,
    item_bytes: isize,
    readonly: c_int,
    dimensions: c_int,
    format: *mut c_char,
    shape: *mut isize,
    strides: *mut isize,
    suboffsets: *mut isize,
    internal: *mut c_void,
}

const FORMAT: c_int = 0x4;
const STRIDES: c_int = 0x18;

unsafe extern "C" {
    fn PyObject_GetBuffer(object: *mut ffi::PyObject, buffer: *mut RawBuffer, flags: c_int) -> c_int;
    fn PyBuffer_Release(buffer: *mut RawBuffer);
}

/// What keeps the bytes where they are. To be dropped with the interpreter's lock in hand.
enum Hold {
    Object { object: Py<PyAny> },
    Buffer(Box<RawBuffer>),
}

// SAFETY: a buffer's description is plain data; it is released with the interpreter's lock in hand.
unsafe impl Send for Hold {}
// SAFETY: as above; it is only ever read.
unsafe impl Sync for Hold {}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Self::Buffer(buffer) = self {
            // SAFETY: got by `PyObject_GetBuffer`, released once; whoever drops this has the interpreter's lock.
            Python::attach(|_| unsafe { PyBuffer_Release(&mut **buffer) });
        }
    }
}

/// A tensor of the caller's, contiguous.
pub(crate) struct View {
    pub(crate) address: usize,
    /// The GPU that it is on; none for host memory.
    pub(crate) gpu: Option<u32>,
    pub(crate) bytes: usize,
    pub(crate) dtype: Dtype,
    shape: [usize; MAX_DIMENSIONS],
    dimensions: usize,
    hold: Hold,
}

impl View {
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape[..self.dimensions]
    }

    /// What keeps a GPU's memory for as long as copies of it are under way.
    pub(crate) fn keeper(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        match &self.hold {
            Hold::Object { object } => Some(object.clone_ref(py)),
            Hold::Buffer(_) => None,
        }
    }

    /// Its bytes.
    ///
    /// # Safety
    /// It is host memory, and nobody may write there meanwhile.
    pub(crate) unsafe fn as_slice(&self) -> &[u8] {
        if self.bytes == 0 {
            return &[];
        }
        // SAFETY: valid for its bytes while it is held; not written to by the contract.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) }
    }
}

/// Looks at a tensor in host memory, which `name` names in errors.
pub(crate) fn view(object: &Bound<'_, PyAny>, writable: bool, name: &dyn Fn() -> String) -> Result<View, Failure> {
    view_near(object, writable, None, name)
}

/// The same, also for one that is on `gpu`.
pub(crate) fn view_near(
    object: &Bound<'_, PyAny>,
    writable: bool,
    gpu: Option<u32>,
    name: &dyn Fn() -> String,
) -> Result<View, Failure> {
    let view = view_anywhere(object, writable, name)?;
    match (view.gpu, gpu) {
        (None, _) => Ok(view),
        (Some(found), Some(wanted)) if found == wanted => Ok(view),
        (Some(found), Some(wanted)) => {
            Err(Failure::Device(format!("{}: it is on GPU {found}, and this process is at GPU {wanted}", name())))
        }
        (Some(found), None) => Err(Failure::Device(format!(
            "{}: it is on GPU {found}, and host memory is wanted: copy it to the CPU first, or have fserver_lib do it with \
             STEPMESH_BAKCEND=GPU",
            name()
        ))),
    }
}

fn view_anywhere(object: &Bound<'_, PyAny>, writable: bool, name: &dyn Fn() -> String) -> Result<View, Failure> {
    let py = object.py();
    if let Some(torch) = Torch::known(py)
        && torch.is_tensor(object)?
    {
        return torch.view(object, name);
    }
    if let Some(view) = buffer(object, writable, name)? {
        return Ok(view);
    }
    match Torch::get(py)? {
        Some(torch) if torch.is_tensor(object)? => torch.view(object, name),
        _ if object.hasattr(intern!(py, "__dlpack__"))? => from_dlpack(object, writable, name),
        _ => match from_interface(object, writable, name)? {
            Some(view) => Ok(view),
            None => Err(Failure::Type(format!(
                "{}: {} is no tensor: neither PyTorch's, nor a buffer, nor DLPack's",
                name(),
                type_name(object)
            ))),
        },
    }
}

/// The GPU of a tensor that is on one, as far as it says so.
fn gpu_of(object: &Bound<'_, PyAny>) -> PyResult<u32> {
    let py = object.py();
    if !object.hasattr(intern!(py, "__dlpack_device__"))? {
        return Ok(0);
    }
    let (_, index): (i32, u32) = object.call_method0(intern!(py, "__dlpack_device__"))?.extract()?;
    Ok(index)
}

fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "it".to_owned(), |name| name.to_string())
}

fn contiguous(name: &dyn Fn() -> String) -> Failure {
    Failure::Invalid(format!("{}: the tensor is not contiguous: call contiguous() first", name()))
}

fn too_many_dimensions(name: &dyn Fn() -> String) -> Failure {
    Failure::Invalid(format!("{}: more than {MAX_DIMENSIONS} dimensions", name()))
}

fn no_dtype(name: &dyn Fn() -> String, what: &str) -> Failure {
    Failure::Type(format!("{}: element type {what} is not one that travels: view the tensor as bytes", name()))
}

fn freed(name: &dyn Fn() -> String) -> Failure {
    Failure::Invalid(format!("{}: the tensor's memory has been freed", name()))
}

fn build(
    (address, gpu): (usize, Option<u32>),
    dtype: Dtype,
    sizes: impl ExactSizeIterator<Item = usize>,
    hold: Hold,
    name: &dyn Fn() -> String,
) -> Result<View, Failure> {
    let dimensions = sizes.len();
    if dimensions > MAX_DIMENSIONS {
        return Err(too_many_dimensions(name));
    }
    let (mut shape, mut bytes) = ([0; MAX_DIMENSIONS], dtype.bytes());
    for (to, from) in shape.iter_mut().zip(sizes) {
        *to = from;
        bytes = bytes.saturating_mul(from);
    }
    if address == 0 && bytes > 0 {
        return Err(freed(name));
    }
    Ok(View { address, gpu, bytes, dtype, shape, dimensions, hold })
}

/// Whether strides, in `unit`s, are those of a contiguous tensor.
fn is_contiguous(shape: &[isize], strides: &[isize], unit: isize) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut expected = unit;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size != 1 && stride != expected {
            return false;
        }
        expected *= size;
    }
    true
}

/// # Safety
/// `pointer` is null or valid for `count` values.
unsafe fn slice<'a>(pointer: *const isize, count: usize) -> &'a [isize] {
    // SAFETY: by the contract.
    if pointer.is_null() { &[] } else { unsafe { std::slice::from_raw_parts(pointer, count) } }
}

fn buffer(object: &Bound<'_, PyAny>, writable: bool, name: &dyn Fn() -> String) -> Result<Option<View>, Failure> {
    // SAFETY: a zeroed description is what the call expects to fill.
    let mut raw: Box<RawBuffer> = Box::new(unsafe { std::mem::zeroed() });
    // SAFETY: both pointers are valid; without success nothing is to be released.
    if unsafe { PyObject_GetBuffer(object.as_ptr(), &mut *raw, FORMAT | STRIDES) } != 0 {
        drop(PyErr::take(object.py()));
        return Ok(None);
    }
    let hold = Hold::Buffer(raw);
    let Hold::Buffer(raw) = &hold else { return Ok(None) };
    if writable && raw.readonly != 0 {
        return Err(Failure::Invalid(format!("{}: the tensor is read-only", name())));
    }
    let format: &[u8] = if raw.format.is_null() {
        b"B"
    } else {
        // SAFETY: terminated, by the buffer protocol, and held.
        unsafe { CStr::from_ptr(raw.format) }.to_bytes()
    };
    let Some(dtype) = dtype::from_format(format, raw.item_bytes as usize) else {
        return Err(no_dtype(name, &String::from_utf8_lossy(format)));
    };
    // SAFETY: by the buffer protocol, with the flags given.
    let (shape, strides) =
        unsafe { (slice(raw.shape, raw.dimensions as usize), slice(raw.strides, raw.dimensions as usize)) };
    if !is_contiguous(shape, strides, raw.item_bytes) {
        return Err(contiguous(name));
    }
    let (address, sizes) = (raw.data as usize, shape.iter().map(|&size| size as usize));
    let mut dimensions = [0; 64];
    let count = sizes.len().min(64);
    dimensions.iter_mut().zip(sizes).for_each(|(to, from)| *to = from);
    build((address, None), dtype, dimensions[..count].iter().copied(), hold, name).map(Some)
}

/// NumPy's own description, for its element types that no buffer's format has (ml_dtypes' bfloat16), and what follows it for a
/// GPU's memory (CuPy, Numba).
fn from_interface(
    object: &Bound<'_, PyAny>,
    writable: bool,
    name: &dyn Fn() -> String,
) -> Result<Option<View>, Failure> {
    let py = object.py();
    let (interface, gpu) = match object.getattr(intern!(py, "__cuda_array_interface__")) {
        Ok(interface) => (interface, Some(gpu_of(object)?)),
        Err(_) => match object.getattr(intern!(py, "__array_interface__")) {
            Ok(interface) => (interface, None),
            Err(_) => return Ok(None),
        },
    };
    let interface = interface.cast_into::<PyDict>().map_err(PyErr::from)?;
    let item = |key: &str| {
        let item = interface.get_item(key)?;
        item.ok_or_else(|| Failure::Type(format!("{}: its array interface has no {key}", name())))
    };
    let (address, readonly): (usize, bool) = item("data")?.extract()?;
    if writable && readonly {
        return Err(Failure::Invalid(format!("{}: the tensor is read-only", name())));
    }
    let shape: Vec<usize> = item("shape")?.extract()?;
    let named = object.getattr(intern!(py, "dtype"))?.str()?;
    let named = named.to_string_lossy();
    let dtype = dtype::from_name(&named).ok_or_else(|| no_dtype(name, &named))?;
    let strides = interface.get_item("strides")?.filter(|strides| !strides.is_none());
    if let Some(strides) = strides {
        let strides: Vec<isize> = strides.extract()?;
        let sizes: Vec<isize> = shape.iter().map(|&size| size as isize).collect();
        if !is_contiguous(&sizes, &strides, dtype.bytes() as isize) {
            return Err(contiguous(name));
        }
    }
    let hold = Hold::Object { object: object.clone().unbind() };
    build((address, gpu), dtype, shape.into_iter(), hold, name).map(Some)
}

fn from_dlpack(object: &Bound<'_, PyAny>, writable: bool, name: &dyn Fn() -> String) -> Result<View, Failure> {
    let py = object.py();
    let device: (i32, i32) = object.call_method0(intern!(py, "__dlpack_device__"))?.extract()?;
    if device.0 != CPU {
        let described = (device.0 == CUDA).then(|| from_interface(object, writable, name)).transpose()?.flatten();
        return described.ok_or_else(|| {
            Failure::Device(format!("{}: it is on DLPack device {device:?}: copy it to the CPU first", name()))
        });
    }
    // Some, like NumPy's bfloat16, have the method and refuse.
    let capsule = match object.call_method0(intern!(py, "__dlpack__")) {
        Ok(capsule) => capsule,
        Err(error) => return from_interface(object, writable, name)?.ok_or(Failure::Python(error)),
    };
    // SAFETY: null with an exception if it is no capsule of this name.
    let managed = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), LEGACY.as_ptr()) }.cast::<DlManaged>();
    if managed.is_null() {
        return Err(PyErr::fetch(py).into());
    }
    // SAFETY: valid while the capsule is, which is held; nobody consumes it.
    let tensor = unsafe { &(*managed).tensor };
    let count = tensor.dimensions.max(0) as usize;
    if count > MAX_DIMENSIONS {
        return Err(too_many_dimensions(name));
    }
    // SAFETY: DLPack's contract; an i64 is an isize on the 64-bit systems that this is for.
    let (shape, strides) = unsafe { (slice(tensor.shape.cast(), count), slice(tensor.strides.cast(), count)) };
    if !tensor.strides.is_null() && !is_contiguous(shape, strides, 1) {
        return Err(contiguous(name));
    }
    let kind = tensor.dtype;
    let dtype = dtype::from_dlpack(kind.code, kind.bits).filter(|_| kind.lanes == 1);
    let dtype = dtype.ok_or_else(|| no_dtype(name, &format!("{}:{}", kind.code, kind.bits)))?;
    let address = tensor.data as usize + tensor.byte_offset as usize;
    let sizes: Vec<usize> = shape.iter().map(|&size| size as usize).collect();
    build((address, None), dtype, sizes.into_iter(), Hold::Object { object: capsule.unbind() }, name)
}

/// The beginning of `DLPackExchangeAPI` of dlpack.h, up to what is used: functions that need no call of Python's.
#[repr(C)]
struct ExchangeApi {
    version: (u32, u32),
    _earlier: *const c_void,
    _allocator: *const c_void,
    _managed_from_object: *const c_void,
    _managed_to_object: *const c_void,
    /// Describes a tensor without owning it; -1 with an exception if it cannot.
    tensor_from_object: Option<unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int>,
}

/// A framework's function of that kind, which lives as long as the process.
type TensorFromObject = unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int;

fn exchange_api(tensor: &Bound<'_, PyType>) -> Option<TensorFromObject> {
    let capsule = tensor.getattr("__dlpack_c_exchange_api__").ok()?;
    // SAFETY: null, with an exception, if it is no capsule of this name.
    let api = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dlpack_exchange_api".as_ptr()) };
    if api.is_null() {
        drop(PyErr::take(tensor.py()));
        return None;
    }
    // SAFETY: by DLPack's contract a table of functions that is never freed; of this version it begins so.
    let api = unsafe { &*api.cast::<ExchangeApi>() };
    api.tensor_from_object.filter(|_| api.version.0 == 1)
}

/// A tensor as the framework's own function describes it; none if anything about it is not as it should be.
fn described(exchange: TensorFromObject, object: &Bound<'_, PyAny>) -> Option<View> {
    let mut tensor = std::mem::MaybeUninit::<DlTensor>::uninit();
    // SAFETY: called with the interpreter's lock in hand, an object of the framework's and a place for the answer.
    if unsafe { exchange(object.as_ptr().cast(), tensor.as_mut_ptr()) } != 0 {
        drop(PyErr::take(object.py()));
        return None;
    }
    // SAFETY: filled in, by the return value.
    let tensor = unsafe { tensor.assume_init() };
    let count = usize::try_from(tensor.dimensions).ok().filter(|&count| count <= MAX_DIMENSIONS)?;
    // SAFETY: valid as long as the object is not changed, which is longer than this; an i64 is an isize.
    let (shape, strides) = unsafe { (slice(tensor.shape.cast(), count), slice(tensor.strides.cast(), count)) };
    let gpu = match tensor.device {
        (CPU, _) => None,
        (CUDA, index) => Some(u32::try_from(index).ok()?),
        _ => return None,
    };
    if !(tensor.strides.is_null() || is_contiguous(shape, strides, 1)) {
        return None;
    }
    let dtype = dtype::from_dlpack(tensor.dtype.code, tensor.dtype.bits).filter(|_| tensor.dtype.lanes == 1)?;
    let address = tensor.data as usize + tensor.byte_offset as usize;
    let mut sizes = [0; MAX_DIMENSIONS];
    sizes.iter_mut().zip(shape).for_each(|(to, from)| *to = *from as usize);
    let hold = Hold::Object { object: object.clone().unbind() };
    build((address, gpu), dtype, sizes[..count].iter().copied(), hold, &String::new).ok()
}

/// PyTorch, if the program has imported it.
struct Torch {
    exchange: Option<TensorFromObject>,
    tensor: Py<PyType>,
    dtypes: Vec<(Py<PyAny>, Dtype)>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

impl Torch {
    /// As it was found by [`Torch::get`].
    fn known(py: Python<'_>) -> Option<&Self> {
        TORCH.get(py)
    }

    /// Looks for it among what the program has imported, which takes a microsecond where it has not.
    fn get(py: Python<'_>) -> PyResult<Option<&Self>> {
        if let Some(torch) = TORCH.get(py) {
            return Ok(Some(torch));
        }
        let modules = py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))?;
        let Ok(torch) = modules.get_item(intern!(py, "torch")) else { return Ok(None) };
        // Half imported, it has no tensors yet.
        let Ok(tensor) = torch.getattr(intern!(py, "Tensor")) else { return Ok(None) };
        let tensor = tensor.cast_into::<PyType>()?;
        let exchange = exchange_api(&tensor);
        let tensor = tensor.unbind();
        let names = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "uint8", "uint16", "int32"];
        let more = ["int64", "uint32", "float64", "int8", "int16", "bool"];
        let dtypes = names
            .iter()
            .chain(&more)
            .filter_map(|name| Some((torch.getattr(*name).ok()?.unbind(), dtype::from_name(name)?)));
        let dtypes = dtypes.collect();
        Ok(Some(TORCH.get_or_init(py, || Self { exchange, tensor, dtypes })))
    }

    fn is_tensor(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        let tensor = self.tensor.bind(object.py());
        Ok(object.get_type().is(tensor) || object.is_instance(tensor)?)
    }

    fn view(&self, object: &Bound<'_, PyAny>, name: &dyn Fn() -> String) -> Result<View, Failure> {
        match self.exchange.and_then(|exchange| described(exchange, object)) {
            Some(view) => Ok(view),
            // Asked in Python, which also says what is wrong with it.
            None => self.view_by_attributes(object, name),
        }
    }

    fn view_by_attributes(&self, object: &Bound<'_, PyAny>, name: &dyn Fn() -> String) -> Result<View, Failure> {
        let py = object.py();
        let gpu = if object.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            None
        } else if object.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
            Some(object.call_method0(intern!(py, "get_device"))?.extract()?)
        } else {
            let device = object.getattr(intern!(py, "device"))?;
            return Err(Failure::Device(format!("{}: the tensor is on {device}: call cpu() first", name())));
        };
        if !object.call_method0(intern!(py, "is_contiguous"))?.is_truthy()? {
            return Err(contiguous(name));
        }
        let kind = object.getattr(intern!(py, "dtype"))?;
        let dtype = self.dtypes.iter().find(|(known, _)| known.is(&kind)).map(|(_, dtype)| *dtype);
        let dtype = dtype.ok_or_else(|| no_dtype(name, &kind.to_string()))?;
        let address: usize = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let shape = object.getattr(intern!(py, "shape"))?.cast_into::<PyTuple>().map_err(PyErr::from)?;
        if shape.len() > MAX_DIMENSIONS {
            return Err(too_many_dimensions(name));
        }
        let mut sizes = [0_usize; MAX_DIMENSIONS];
        for (index, size) in sizes.iter_mut().enumerate().take(shape.len()) {
            *size = shape.get_item(index)?.extract()?;
        }
        let hold = Hold::Object { object: object.clone().unbind() };
        build((address, gpu), dtype, sizes[..shape.len()].iter().copied(), hold, name)
    }
}
