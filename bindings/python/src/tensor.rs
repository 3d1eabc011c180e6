//! Registered memory as a tensor: handed to NumPy, PyTorch, JAX without a copy, by DLPack and the array interface.

use crate::dtype;
use crate::error::Failure;
use pyo3::exceptions::PyAttributeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::ffi::{CStr, c_void};
use std::ops::Range;
use stepmesh_proto::{Dtype, Part};
use stepmesh_transport::Region;

/// A tensor in a slot. It keeps the memory in being; whose turn it is to write there the protocol says.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct Tensor {
    region: Region,
    /// On the device, if it is one's.
    address: usize,
    bytes: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    readonly: bool,
}

impl Tensor {
    /// The GPU that it is on.
    fn gpu(&self) -> Option<u32> {
        self.region.memory().gpu()
    }

    /// DLPack's name of where it is.
    fn device(&self) -> (i32, i32) {
        self.gpu().map_or((CPU, 0), |index| (CUDA, index as i32))
    }

    /// Type, shape and address, as NumPy and those that follow it for CUDA want them.
    fn interface<'py>(&self, py: Python<'py>, version: u8) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", version)?;
        interface.set_item("shape", self.shape(py)?)?;
        interface.set_item("typestr", dtype::typestr(self.dtype))?;
        interface.set_item("data", (self.address, self.readonly))?;
        Ok(interface)
    }

    /// The whole of a place, or as much as the shape takes.
    pub(crate) fn new(
        (region, place): (Region, Range<usize>),
        dtype: Dtype,
        shape: Option<Vec<usize>>,
        readonly: bool,
    ) -> Result<Self, Failure> {
        let room = place.len();
        let shape = shape.unwrap_or_else(|| vec![room / dtype.bytes()]);
        let bytes = shape.iter().try_fold(dtype.bytes(), |bytes, &size| bytes.checked_mul(size));
        let Some(bytes) = bytes.filter(|&bytes| bytes <= room) else {
            let name = dtype::name(dtype);
            return Err(Failure::Invalid(format!("shape: {shape:?} of {name} does not fit the part's {room} bytes")));
        };
        let address = match region.on_device() {
            false => region.at(place)?.as_ptr() as usize,
            true if place.end <= region.len() => region.base().as_ptr() as usize + place.start,
            true => return Err(Failure::Invalid(format!("part: it ends at {} of {} bytes", place.end, region.len()))),
        };
        let readonly = readonly || !region.writable();
        Ok(Self { region, address, bytes, dtype, shape, readonly })
    }

    /// As [`Tensor::new`], of a place that is known ahead, if it is.
    pub(crate) fn at(
        place: Option<(Region, Range<usize>)>,
        dtype: Option<&Bound<'_, PyAny>>,
        shape: Option<Vec<usize>>,
    ) -> Result<Self, Failure> {
        let dtype = dtype.map_or(Ok(Dtype::Bytes), dtype::extract)?;
        let place = place.ok_or_else(|| Failure::Invalid("part: no link, microbatch or part of that number".into()))?;
        Self::new(place, dtype, shape, false)
    }

    /// What is in use of a part: `[rows, elements of a row]`, or bytes where the type does not divide the row.
    pub(crate) fn of_part(part: &Part, place: (Region, Range<usize>), readonly: bool) -> Result<Self, Failure> {
        let (rows, row_bytes) = (part.rows as usize, part.row_bytes as usize);
        let dtype = if row_bytes.is_multiple_of(part.dtype.bytes()) { part.dtype } else { Dtype::Bytes };
        Self::new(place, dtype, Some(vec![rows, row_bytes / dtype.bytes()]), readonly)
    }
}

#[pymethods]
impl Tensor {
    /// Sizes, outermost first.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// The element type's name.
    #[getter]
    fn dtype(&self) -> &'static str {
        dtype::name(self.dtype)
    }

    /// Bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.bytes
    }

    /// Address of the first byte.
    #[getter]
    fn data_ptr(&self) -> usize {
        self.address
    }

    /// Whether this process may not write there.
    #[getter]
    fn readonly(&self) -> bool {
        self.readonly
    }

    /// The same memory in another shape, as another type; both as they are where not given.
    #[pyo3(signature = (shape=None, dtype=None))]
    fn view(&self, shape: Option<Vec<usize>>, dtype: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let dtype = dtype.map_or(Ok(self.dtype), dtype::extract)?;
        let start = self.address - self.region.base().as_ptr() as usize;
        let shape = shape.unwrap_or_else(|| vec![self.bytes / dtype.bytes()]);
        Ok(Self::new((self.region.clone(), start..start + self.bytes), dtype, Some(shape), self.readonly)?)
    }

    /// NumPy's description of the memory; bfloat16 and FP8 appear as unsigned integers of their size.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        match self.gpu() {
            None => self.interface(py, 3),
            Some(index) => Err(PyAttributeError::new_err(format!("the tensor is on GPU {index}: NumPy cannot see it"))),
        }
    }

    /// The same description for CuPy, Numba and others that see a GPU's memory. No stream has to be waited for.
    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        match self.gpu() {
            Some(_) => self.interface(py, 3),
            None => Err(PyAttributeError::new_err("the tensor is in host memory")),
        }
    }

    /// `cpu`, or `cuda:N`.
    #[getter(device)]
    fn device_name(&self) -> String {
        self.gpu().map_or("cpu".into(), |index| format!("cuda:{index}"))
    }

    /// The CPU or a GPU.
    fn __dlpack_device__(&self) -> (i32, i32) {
        self.device()
    }

    /// A capsule that shares the memory.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__(
        slf: &Bound<'_, Self>,
        stream: Option<&Bound<'_, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        let device = slf.get().device();
        // Whoever is handed a slot of a GPU may use it on any stream at once.
        if device.0 == CPU && stream.is_some() || dl_device.is_some_and(|wanted| wanted != device) {
            let name = slf.get().device_name();
            return Err(Failure::Device(format!("the memory is on {name}, and stays there")).into());
        }
        if copy == Some(true) {
            return Err(Failure::Invalid("copy: a slot is shared, not copied".into()).into());
        }
        let this = slf.get();
        let (code, bits) = dtype::dlpack(this.dtype);
        let shape: Vec<i64> = this.shape.iter().map(|&size| size as i64).collect();
        let mut strides = vec![1_i64; shape.len()];
        for index in (1..shape.len()).rev() {
            strides[index - 1] = strides[index] * shape[index].max(1);
        }
        let mut held = Box::new(Held { shape, strides, _tensor: slf.clone().unbind(), legacy: None, versioned: None });
        let tensor = DlTensor {
            data: this.address as *mut c_void,
            device,
            dimensions: held.shape.len() as i32,
            dtype: DlType { code, bits, lanes: 1 },
            shape: held.shape.as_mut_ptr(),
            strides: held.strides.as_mut_ptr(),
            byte_offset: 0,
        };
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        let context = std::ptr::from_mut(&mut *held).cast::<c_void>();
        let (pointer, name) = if versioned {
            let flags = if this.readonly { READ_ONLY } else { 0 };
            let managed = DlVersioned { version: (1, 0), context, deleter: Some(delete_versioned), flags, tensor };
            (std::ptr::from_mut(held.versioned.insert(managed)).cast::<c_void>(), VERSIONED)
        } else {
            let managed = DlManaged { tensor, context, deleter: Some(delete) };
            (std::ptr::from_mut(held.legacy.insert(managed)).cast::<c_void>(), LEGACY)
        };
        let _ = Box::into_raw(held);
        let py = slf.py();
        // SAFETY: the pointer is not null, the name and the destructor live for ever; what is held is freed by the
        // consumer's call of the deleter, or by the destructor of a capsule that nobody consumed.
        unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyCapsule_New(pointer, name.as_ptr(), Some(drop_capsule))) }
            .map(Bound::unbind)
    }

    fn __repr__(&self) -> String {
        let access = if self.readonly { "read-only" } else { "writable" };
        let device = self.device_name();
        format!("stepmesh.Tensor(shape={:?}, dtype={}, {device}, {access})", self.shape, dtype::name(self.dtype))
    }
}

/// DLPack's numbers.
pub(crate) const CPU: i32 = 1;
pub(crate) const CUDA: i32 = 2;
const READ_ONLY: u64 = 1;
pub(crate) const LEGACY: &CStr = c"dltensor";
pub(crate) const VERSIONED: &CStr = c"dltensor_versioned";

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DlType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

/// `DLTensor` of dlpack.h.
#[repr(C)]
pub(crate) struct DlTensor {
    pub(crate) data: *mut c_void,
    pub(crate) device: (i32, i32),
    pub(crate) dimensions: i32,
    pub(crate) dtype: DlType,
    pub(crate) shape: *mut i64,
    pub(crate) strides: *mut i64,
    pub(crate) byte_offset: u64,
}

/// `DLManagedTensor` of dlpack.h.
#[repr(C)]
pub(crate) struct DlManaged {
    pub(crate) tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlManaged)>,
}

/// `DLManagedTensorVersioned` of dlpack.h.
#[repr(C)]
struct DlVersioned {
    version: (u32, u32),
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlVersioned)>,
    flags: u64,
    tensor: DlTensor,
}

/// What a consumer of a capsule keeps alive.
struct Held {
    shape: Vec<i64>,
    strides: Vec<i64>,
    _tensor: Py<Tensor>,
    legacy: Option<DlManaged>,
    versioned: Option<DlVersioned>,
}

/// # Safety
/// `managed` is one of ours that has not been deleted.
unsafe extern "C" fn delete(managed: *mut DlManaged) {
    // SAFETY: by the contract, `context` is the box that `__dlpack__` leaked.
    drop(unsafe { Box::from_raw((*managed).context.cast::<Held>()) });
}

/// # Safety
/// As [`delete`].
unsafe extern "C" fn delete_versioned(managed: *mut DlVersioned) {
    // SAFETY: as in `delete`.
    drop(unsafe { Box::from_raw((*managed).context.cast::<Held>()) });
}

/// # Safety
/// Called by the interpreter with a capsule of ours.
unsafe extern "C" fn drop_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: the capsule is ours. A consumer renames it and deletes for itself; under the old name nobody has.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, LEGACY.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, LEGACY.as_ptr()).cast());
        } else if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) == 1 {
            delete_versioned(ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast());
        }
    }
}
