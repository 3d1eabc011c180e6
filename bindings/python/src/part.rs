//! A part of a transfer as Python says it.

use crate::dtype;
use crate::error::Failure;
use pyo3::prelude::*;
use stepmesh_proto::{Dtype, MAX_PARTS, Part as MeshPart};

/// One part of a transfer: `[rows, row_bytes]` under a key.
#[pyclass(frozen, eq, module = "stepmesh")]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Part(pub(crate) MeshPart);

impl Part {
    /// As it travelled; where it lies in the slot is the mesh's business.
    pub(crate) fn of(part: &MeshPart) -> Self {
        Self(MeshPart { offset: 0, ..*part })
    }
}

#[pymethods]
impl Part {
    #[new]
    #[pyo3(signature = (rows, row_bytes, dtype=None, key=0))]
    fn new(rows: u32, row_bytes: u32, dtype: Option<&Bound<'_, PyAny>>, key: u64) -> PyResult<Self> {
        let dtype = dtype.map_or(Ok(Dtype::Bytes), dtype::extract)?;
        Ok(Self(MeshPart { key, dtype, rows, row_bytes, offset: 0 }))
    }

    /// Rows in use.
    #[getter]
    fn rows(&self) -> u32 {
        self.0.rows
    }

    /// Bytes of one row.
    #[getter]
    fn row_bytes(&self) -> u32 {
        self.0.row_bytes
    }

    /// The element type's name.
    #[getter]
    fn dtype(&self) -> &'static str {
        dtype::name(self.0.dtype)
    }

    /// The sender's name for it.
    #[getter]
    fn key(&self) -> u64 {
        self.0.key
    }

    pub(crate) fn __repr__(&self) -> String {
        let MeshPart { key, rows, row_bytes, dtype, .. } = self.0;
        format!("stepmesh.Part(rows={rows}, row_bytes={row_bytes}, dtype={:?}, key={key})", dtype::name(dtype))
    }
}

/// The parts of a transfer, and how many.
pub(crate) struct Parts([MeshPart; MAX_PARTS], usize);

impl Parts {
    pub(crate) fn read(given: &Bound<'_, PyAny>) -> Result<Self, Failure> {
        let mut parts = Self([MeshPart::default(); MAX_PARTS], 0);
        for part in given.try_iter()? {
            let part = part?;
            let part = part.cast::<Part>().map_err(|_| {
                Failure::Type(format!("parts[{}]: a stepmesh.Part is wanted, not {}", parts.1, part.get_type()))
            })?;
            if parts.1 == MAX_PARTS {
                return Err(Failure::Invalid(format!("parts: more than {MAX_PARTS}, and a transfer carries no more")));
            }
            parts.0[parts.1] = part.get().0;
            parts.1 += 1;
        }
        Ok(parts)
    }

    pub(crate) fn in_use(&self) -> &[MeshPart] {
        &self.0[..self.1]
    }
}

/// The application's 16 bytes; fewer are filled up with zeros.
pub(crate) fn app(given: &[u8]) -> Result<[u8; 16], Failure> {
    let mut app = [0; 16];
    let to = app.get_mut(..given.len());
    to.ok_or_else(|| Failure::Invalid(format!("app: {} bytes, and 16 travel", given.len())))?.copy_from_slice(given);
    Ok(app)
}
