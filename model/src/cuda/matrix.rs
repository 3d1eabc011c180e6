//! Weights on a device, row by row.

use half::bf16;

use super::memory::{Arena, Staging};
use crate::dtype::to_bf16;
use crate::fp8::{self, FP8_GROUP};
use crate::kernel::Values;
use crate::load::{Loaded, Part, Scales};
use crate::tensor::Tensor;
use crate::{Dtype, ModelError};
use stepmesh_transport::cuda::Span;

/// What rows of weights and activations are padded to, in elements: kernels copy 16 bytes at a time.
pub(super) const PAD: usize = 16;

/// Weights in host memory, on their way to a device.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    rows: usize,
    cols: usize,
    values: Elements,
}

#[derive(Debug, Clone)]
enum Elements {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    /// Codes, and for each row the scales of its groups of 128.
    Fp8(Vec<u8>, Vec<f32>),
}

impl Loaded for Rows {
    fn none() -> Self {
        Self { rows: 0, cols: 0, values: Elements::F32(Vec::new()) }
    }

    fn read(tensor: &Tensor<'_>, part: &Part<'_>, scales: Option<Scales>, narrow: bool) -> Result<Self, ModelError> {
        let (rows, cols) = (part.rows.clone(), part.cols.clone());
        let values = match scales {
            Some(scales) => {
                let mut codes = Vec::new();
                tensor.read(rows.clone(), cols.clone(), &mut codes, fp8::encode)?;
                let of_row = |row| (0..scales.blocks).map(move |block| (row, block));
                let scales = rows.clone().flat_map(of_row).map(|(row, block)| scales.at(row, block)).collect();
                Elements::Fp8(codes, scales)
            }
            None if narrow => {
                let mut values = Vec::new();
                tensor.read(rows.clone(), cols.clone(), &mut values, to_bf16)?;
                Elements::Bf16(values)
            }
            None => {
                let mut values = Vec::new();
                tensor.read(rows.clone(), cols.clone(), &mut values, |value| value)?;
                Elements::F32(values)
            }
        };
        Ok(Self { rows: rows.len(), cols: cols.len(), values })
    }
}

impl Rows {
    /// As the device multiplies it: 32-bit for f32 activations, bf16 or FP8 for bf16 ones.
    fn prepared(self, dtype: Dtype) -> Result<Self, ModelError> {
        let Self { rows, cols, values } = self;
        let values = match (dtype, values) {
            (Dtype::F32, Elements::Bf16(values)) => Elements::F32(values.into_iter().map(bf16::to_f32).collect()),
            (Dtype::F32, Elements::Fp8(codes, scales)) => {
                let groups = cols.div_ceil(FP8_GROUP);
                let scale = |at: usize| scales[at / cols * groups + at % cols / FP8_GROUP];
                Elements::F32(codes.iter().enumerate().map(|(at, code)| fp8::decode(*code) * scale(at)).collect())
            }
            (Dtype::Bf16, Elements::Fp8(..)) => {
                let reason = "FP8 weights with bf16 activations; use --dtype fp8, or f32".into();
                return Err(ModelError::Unsupported { reason });
            }
            (_, values) => values,
        };
        Ok(Self { rows, cols, values })
    }

    /// One under the other; each first padded with zeros to a multiple of `PAD` rows if `pads`.
    fn stacked(parts: Vec<Self>, pads: bool) -> Result<Self, ModelError> {
        let mut parts = parts.into_iter().map(|mut part| {
            if pads {
                part.pad_rows(part.rows.next_multiple_of(PAD));
            }
            part
        });
        let Some(mut all) = parts.next() else { return Ok(<Self as Loaded>::none()) };
        for part in parts {
            all.rows += part.rows;
            match (&mut all.values, part.values) {
                (Elements::F32(all), Elements::F32(part)) => all.extend(part),
                (Elements::Bf16(all), Elements::Bf16(part)) => all.extend(part),
                (Elements::Fp8(all, all_scales), Elements::Fp8(part, scales)) => {
                    all.extend(part);
                    all_scales.extend(scales);
                }
                _ => {
                    let reason = "projections of one layer that are FP8 in part only; use --dtype f32".into();
                    return Err(ModelError::Unsupported { reason });
                }
            }
        }
        Ok(all)
    }

    fn pad_rows(&mut self, rows: usize) {
        let (elements, groups) = (rows * self.cols, self.cols.div_ceil(FP8_GROUP));
        match &mut self.values {
            Elements::F32(values) => values.resize(elements, 0.0),
            Elements::Bf16(values) => values.resize(elements, bf16::ZERO),
            Elements::Fp8(codes, scales) => {
                codes.resize(elements, 0);
                scales.resize(rows * groups, 0.0);
            }
        }
        self.rows = rows;
    }

    /// Bytes of rows whose pitch is padded.
    fn bytes(&self) -> (usize, Vec<u8>) {
        fn rows<T: Copy>(values: &[T], cols: usize, pitch: usize, put: impl Fn(T, &mut Vec<u8>), zero: T) -> Vec<u8> {
            let mut bytes = Vec::with_capacity(values.len() / cols.max(1) * pitch * size_of::<T>());
            for row in values.chunks(cols.max(1)) {
                row.iter().for_each(|value| put(*value, &mut bytes));
                (row.len()..pitch).for_each(|_| put(zero, &mut bytes));
            }
            bytes
        }
        let (cols, pitch) = (self.cols, self.cols.next_multiple_of(PAD));
        let bytes = match &self.values {
            Elements::F32(values) => rows(values, cols, pitch, |v: f32, to| to.extend(v.to_le_bytes()), 0.0),
            Elements::Bf16(values) => {
                rows(values, cols, pitch, |v: bf16, to| to.extend(v.to_bits().to_le_bytes()), bf16::ZERO)
            }
            Elements::Fp8(codes, _) => rows(codes, cols, pitch, |v: u8, to| to.push(v), 0),
        };
        (pitch, bytes)
    }
}

/// A matrix on a device, or as many of one shape as there are experts.
pub(super) struct Matrix {
    /// Outputs.
    pub(super) n: usize,
    /// Inputs, padded.
    pub(super) k: usize,
    pub(super) is_fp8: bool,
    /// Bytes of each.
    pub(super) weights: Vec<Span>,
    /// Of FP8: `[n, groups of k]` for each.
    pub(super) scales: Vec<Span>,
    /// Where each is, for kernels: addresses of weights, then of scales.
    pub(super) places: Span,
}

impl Matrix {
    /// Of one shape each, of the parts that are stacked.
    pub(super) fn upload(
        matrices: Vec<Vec<Rows>>,
        pads: bool,
        dtype: Dtype,
        arena: &mut Arena,
        staging: &Staging,
    ) -> Result<Self, ModelError> {
        let (mut n, mut k, mut is_fp8, mut weights, mut scales) = (0, 0, false, Vec::new(), Vec::new());
        for parts in matrices {
            let parts = parts.into_iter().map(|part| part.prepared(dtype)).collect::<Result<_, _>>()?;
            let rows = Rows::stacked(parts, pads)?;
            let (pitch, bytes) = rows.bytes();
            (n, k) = (rows.rows, pitch);
            let place = arena.take(bytes.len())?;
            staging.upload_bytes(&bytes, &place)?;
            weights.push(place);
            if let Elements::Fp8(_, of_rows) = &rows.values {
                is_fp8 = true;
                let place = arena.take(of_rows.len() * 4)?;
                staging.upload(of_rows.iter().copied(), &place)?;
                scales.push(place);
            }
        }
        Self::of(n, k, is_fp8, weights, scales, arena, staging)
    }

    /// What lies on the device already.
    pub(super) fn of(
        n: usize,
        k: usize,
        is_fp8: bool,
        weights: Vec<Span>,
        scales: Vec<Span>,
        arena: &mut Arena,
        staging: &Staging,
    ) -> Result<Self, ModelError> {
        let places = arena.take((weights.len() + scales.len()) * 8)?;
        staging.upload(weights.iter().chain(&scales).map(Span::address), &places)?;
        Ok(Self { n, k, is_fp8, weights, scales, places })
    }

    pub(super) fn groups(&self) -> usize {
        self.k.div_ceil(FP8_GROUP)
    }
}

/// A table's rows as they are.
pub(super) fn upload_table(values: &Values, arena: &mut Arena, staging: &Staging) -> Result<(Span, bool), ModelError> {
    let place = arena.take(values.bytes())?;
    match values {
        Values::F32(values) => staging.upload(values.iter().copied(), &place)?,
        Values::Bf16(values) => staging.upload(values.iter().copied(), &place)?,
    }
    Ok((place, matches!(values, Values::Bf16(_))))
}
