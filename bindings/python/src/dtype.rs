//! Element types by the names that NumPy and PyTorch give them.

use crate::error::Failure;
use pyo3::prelude::*;
use stepmesh_proto::Dtype;

/// The mesh's type, its name, NumPy's type string (bfloat16 and FP8 as bare bits), DLPack's code and bits.
struct Names(Dtype, &'static str, &'static str, u8, u8);

const ALL: [Names; 15] = [
    Names(Dtype::Bytes, "bytes", "|u1", 1, 8),
    Names(Dtype::F32, "float32", "<f4", 2, 32),
    Names(Dtype::Bf16, "bfloat16", "<u2", 4, 16),
    Names(Dtype::F16, "float16", "<f2", 2, 16),
    Names(Dtype::Fp8E4M3, "float8_e4m3fn", "|u1", 10, 8),
    Names(Dtype::Fp8E5M2, "float8_e5m2", "|u1", 12, 8),
    Names(Dtype::U8, "uint8", "|u1", 1, 8),
    Names(Dtype::U16, "uint16", "<u2", 1, 16),
    Names(Dtype::I32, "int32", "<i4", 0, 32),
    Names(Dtype::I64, "int64", "<i8", 0, 64),
    Names(Dtype::U32, "uint32", "<u4", 1, 32),
    Names(Dtype::F64, "float64", "<f8", 2, 64),
    Names(Dtype::I8, "int8", "|i1", 0, 8),
    Names(Dtype::I16, "int16", "<i2", 0, 16),
    Names(Dtype::Bool, "bool", "|b1", 6, 8),
];

fn names(dtype: Dtype) -> &'static Names {
    &ALL[dtype as usize]
}

/// Its name.
pub(crate) fn name(dtype: Dtype) -> &'static str {
    names(dtype).1
}

/// NumPy's type string.
pub(crate) fn typestr(dtype: Dtype) -> &'static str {
    names(dtype).2
}

/// DLPack's code and bits.
pub(crate) fn dlpack(dtype: Dtype) -> (u8, u8) {
    (names(dtype).3, names(dtype).4)
}

/// By DLPack's code and bits.
pub(crate) fn from_dlpack(code: u8, bits: u8) -> Option<Dtype> {
    ALL[1..].iter().find(|names| (names.3, names.4) == (code, bits)).map(|names| names.0)
}

/// By name, whether "float32", "torch.float32" or NumPy's own string.
pub(crate) fn from_name(name: &str) -> Option<Dtype> {
    let name = name.rsplit('.').next().unwrap_or(name);
    ALL.iter().find(|names| names.1 == name).map(|names| names.0)
}

/// By the format and item size of a buffer.
pub(crate) fn from_format(format: &[u8], bytes: usize) -> Option<Dtype> {
    let code = match format {
        [code] => *code,
        [b'@' | b'=' | b'<', code] => *code,
        _ => return None,
    };
    Some(match (code, bytes) {
        (b'f', 4) => Dtype::F32,
        (b'd', 8) => Dtype::F64,
        (b'e', 2) => Dtype::F16,
        (b'B' | b'c', 1) => Dtype::U8,
        (b'b', 1) => Dtype::I8,
        (b'?', 1) => Dtype::Bool,
        (b'H', 2) => Dtype::U16,
        (b'h', 2) => Dtype::I16,
        (b'I' | b'L', 4) => Dtype::U32,
        (b'i' | b'l', 4) => Dtype::I32,
        (b'q' | b'l', 8) => Dtype::I64,
        _ => return None,
    })
}

/// A type as a caller says it: a name, a NumPy or a PyTorch type.
pub(crate) fn extract(given: &Bound<'_, PyAny>) -> PyResult<Dtype> {
    let text = given.str()?;
    let text = text.to_string_lossy();
    let class = || given.getattr("__name__").ok()?.extract::<String>().ok();
    from_name(&text)
        .or_else(|| from_name(&class()?))
        .ok_or_else(|| Failure::Invalid(format!("dtype: `{text}` is no element type of stepmesh")).into())
}
