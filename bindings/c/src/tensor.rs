//! Parts of a transfer: as the caller describes what it sends, and as what arrived lies in its slot.

use crate::arguments;
use crate::status::Failure;
use std::ffi::c_void;
use std::ops::Range;
use stepmesh_proto::{Dtype, MAX_PARTS, Part};
use stepmesh_transport::Region;

/// Element types. The mesh moves bytes; the type is carried along.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepmeshDtype {
    /// Bytes without a type.
    Bytes = 0,
    /// IEEE single.
    F32 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// IEEE half.
    F16 = 3,
    /// FP8, e4m3fn.
    Fp8E4m3 = 4,
    /// FP8, e5m2.
    Fp8E5m2 = 5,
    /// Unsigned, 8 bits.
    U8 = 6,
    /// Unsigned, 16 bits.
    U16 = 7,
    /// Signed, 32 bits.
    I32 = 8,
    /// Signed, 64 bits.
    I64 = 9,
    /// Unsigned, 32 bits.
    U32 = 10,
    /// IEEE double.
    F64 = 11,
    /// Signed, 8 bits.
    I8 = 12,
    /// Signed, 16 bits.
    I16 = 13,
    /// Boolean, one byte.
    Bool = 14,
}

/// The mesh's types, each at its code.
const DTYPES: [Dtype; 15] = [
    Dtype::Bytes,
    Dtype::F32,
    Dtype::Bf16,
    Dtype::F16,
    Dtype::Fp8E4M3,
    Dtype::Fp8E5M2,
    Dtype::U8,
    Dtype::U16,
    Dtype::I32,
    Dtype::I64,
    Dtype::U32,
    Dtype::F64,
    Dtype::I8,
    Dtype::I16,
    Dtype::Bool,
];

/// A part that is to be sent, `[rows, row_bytes]`. It lies where the layout has the part of the same index.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepmeshPart {
    /// The caller's name for it.
    pub key: u64,
    /// A StepmeshDtype.
    pub dtype: u32,
    /// Rows in use; zero is legal.
    pub rows: u32,
    /// Bytes of one row.
    pub row_bytes: u32,
}

/// A part that arrived, `[rows, row_bytes]`, in the slot where it landed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepmeshTensor {
    /// The sender's name for it.
    pub key: u64,
    /// A StepmeshDtype.
    pub dtype: u32,
    /// Rows in use.
    pub rows: u32,
    /// Bytes of one row.
    pub row_bytes: u32,
    /// rows * row_bytes bytes: on the GPU if the slots are.
    pub data: *const c_void,
}

// SAFETY: plain values; this crate never follows the address.
unsafe impl Send for StepmeshTensor {}

impl StepmeshTensor {
    pub(crate) fn new(part: &Part, place: Option<(Region, Range<usize>)>) -> Self {
        Self {
            key: part.key,
            dtype: u32::from(part.dtype as u8),
            rows: part.rows,
            row_bytes: part.row_bytes,
            data: place.map_or(std::ptr::null_mut(), |place| address(&place)),
        }
    }
}

/// Where a place begins: in this process's memory or on a GPU.
pub(crate) fn address((region, range): &(Region, Range<usize>)) -> *mut c_void {
    region.base().as_ptr().wrapping_add(range.start).cast()
}

/// The mesh's parts, and how many of them are in use.
pub(crate) struct Parts([Part; MAX_PARTS], usize);

impl Parts {
    /// # Safety
    /// The crate's contract.
    pub(crate) unsafe fn read(pointer: *const StepmeshPart, count: usize) -> Result<Self, Failure> {
        // SAFETY: the crate's contract.
        let given = unsafe { arguments::slice(pointer, count, MAX_PARTS, "parts") }?;
        let mut parts = Self([Part::default(); MAX_PARTS], given.len());
        for (index, (part, given)) in parts.0.iter_mut().zip(given).enumerate() {
            let dtype = DTYPES.get(given.dtype as usize).copied();
            let dtype =
                dtype.ok_or_else(|| Failure::invalid(format!("part {index}: {} is no element type", given.dtype)))?;
            *part = Part { key: given.key, dtype, rows: given.rows, row_bytes: given.row_bytes, offset: 0 };
        }
        Ok(parts)
    }

    pub(crate) fn in_use(&self) -> &[Part] {
        &self.0[..self.1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_at_its_code() {
        for (code, dtype) in DTYPES.into_iter().enumerate() {
            assert_eq!(dtype as usize, code);
        }
        let last = StepmeshPart { key: 0, dtype: StepmeshDtype::Bool as u32, rows: 1, row_bytes: 1 };
        // SAFETY: one part.
        let parts = unsafe { Parts::read(&last, 1) }.unwrap();
        assert_eq!(parts.in_use()[0].dtype, Dtype::Bool);
        // SAFETY: one part.
        assert!(unsafe { Parts::read(&StepmeshPart { dtype: 15, ..last }, 1) }.is_err());
    }
}
