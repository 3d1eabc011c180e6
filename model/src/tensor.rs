//! One tensor of a checkpoint, read in rectangles so that an instance touches only the bytes that it holds.

use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype as FileDtype;

use crate::{ModelError, fp8};

/// A tensor in its file, seen as a matrix: all dimensions but the last are rows.
pub(crate) struct Tensor<'a> {
    name: &'a str,
    file: &'a str,
    cols: usize,
    bytes: &'a [u8],
    element: Element,
}

/// A tensor's element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    F32,
    F16,
    Bf16,
    Fp8,
}

impl Element {
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }
}

impl<'a> Tensor<'a> {
    /// `bytes` are the tensor's data, whose length the header check has tied to `shape` and `dtype`.
    pub(crate) fn new(
        name: &'a str,
        file: &'a str,
        dtype: FileDtype,
        shape: &[usize],
        bytes: &'a [u8],
    ) -> Result<Self, ModelError> {
        let refuse = |advice| {
            let dtype = format!("{dtype:?}");
            Err(ModelError::TensorDtype { tensor: name.into(), file: file.into(), dtype, advice })
        };
        let element = match dtype {
            FileDtype::F32 => Element::F32,
            FileDtype::F16 => Element::F16,
            FileDtype::BF16 => Element::Bf16,
            FileDtype::F8_E4M3 => Element::Fp8,
            _ => return refuse("weights must be BF16, F16, F32 or F8_E4M3"),
        };
        Ok(Self { name, file, cols: shape.last().copied().unwrap_or(1), bytes, element })
    }

    pub(crate) fn element(&self) -> Element {
        self.element
    }

    pub(crate) fn file(&self) -> &str {
        self.file
    }

    /// Appends the elements of `rows` x `cols` in row-major order, converted by `convert`, to `out`. FP8 elements come
    /// as their codes' values, not scaled.
    ///
    /// The range must lie in the tensor's shape, which the caller has checked by naming it.
    pub(crate) fn read<T>(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut Vec<T>,
        convert: impl Fn(f32) -> T,
    ) -> Result<(), ModelError> {
        out.reserve(rows.len() * cols.len());
        for row in rows {
            let first = row * self.cols + cols.start;
            let width = self.element.bytes();
            let bytes = self.bytes.get(first * width..(first + cols.len()) * width).unwrap_or_default();
            let before = out.len();
            match self.element {
                Element::F32 => {
                    let (words, _) = bytes.as_chunks::<4>();
                    self.push(first, words.iter().map(|word| f32::from_le_bytes(*word)), out, &convert)?;
                }
                Element::F16 => {
                    let (words, _) = bytes.as_chunks::<2>();
                    self.push(first, words.iter().map(|word| f16::from_le_bytes(*word).to_f32()), out, &convert)?;
                }
                Element::Bf16 => {
                    let (words, _) = bytes.as_chunks::<2>();
                    self.push(first, words.iter().map(|word| bf16::from_le_bytes(*word).to_f32()), out, &convert)?;
                }
                Element::Fp8 => self.push(first, bytes.iter().map(|code| fp8::decode(*code)), out, &convert)?,
            }
            if out.len() - before != cols.len() {
                return Err(ModelError::Safetensors {
                    file: self.file.into(),
                    reason: format!("tensor `{}` has no row {row}, columns {cols:?}", self.name),
                });
            }
        }
        Ok(())
    }

    fn push<T>(
        &self,
        first: usize,
        values: impl Iterator<Item = f32>,
        out: &mut Vec<T>,
        convert: impl Fn(f32) -> T,
    ) -> Result<(), ModelError> {
        let mut bad = None;
        out.extend(values.enumerate().map(|(i, value)| {
            if !value.is_finite() && bad.is_none() {
                bad = Some((first + i, value));
            }
            convert(value)
        }));
        match bad {
            None => Ok(()),
            Some((element, value)) => {
                Err(ModelError::NonFiniteWeight { tensor: self.name.into(), file: self.file.into(), element, value })
            }
        }
    }
}
