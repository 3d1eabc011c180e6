//! One linear layer by itself, for whoever measures what the stages multiply with.

use half::bf16;

use crate::ModelError;
use crate::fp8::{self, FP8_GROUP};
use crate::kernel::{Cores, Matrix, QuantiseScratch, WIDTH, Weights};
use crate::stage::check_len;

/// What a [`Linear`] layer's weights are, and what they are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearKind {
    /// 32-bit weights and activations.
    F32,
    /// bfloat16 weights, 32-bit activations.
    Bf16,
    /// FP8 weights with a scale for every 128 x 128, 32-bit activations.
    Fp8,
    /// As `Fp8`, with activations that are quantised too: for each token with a scale for every 128.
    W8a8,
}

impl LinearKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Fp8, Self::W8a8];

    /// `f32`, `bf16`, `fp8` or `w8a8`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::W8a8 => "w8a8",
        }
    }
}

/// A linear layer with weights `[rows, cols]`, kept and multiplied as the stages do.
#[derive(Debug)]
pub struct Linear {
    rows: usize,
    cols: usize,
    matrix: Matrix,
    quantises: bool,
    cores: Cores,
    scratch: QuantiseScratch,
}

impl Linear {
    /// A layer whose weight at `(row, col)` is `weight(row, col)`, rounded as `kind` says; FP8 scales are `scale`.
    /// `threads` share its products.
    ///
    /// # Errors
    /// [`ModelError::Threads`].
    pub fn new(
        rows: usize,
        cols: usize,
        kind: LinearKind,
        threads: usize,
        scale: f32,
        weight: impl Fn(usize, usize) -> f32,
    ) -> Result<Self, ModelError> {
        fn panels<T>(rows: usize, cols: usize, at: impl Fn(usize, usize) -> T) -> Vec<[T; WIDTH]> {
            let places = (0..rows.div_ceil(WIDTH)).flat_map(|panel| (0..cols).map(move |col| (panel * WIDTH, col)));
            places.map(|(row, col)| std::array::from_fn(|lane| at(row + lane, col))).collect()
        }
        let held = |row: usize, col: usize| if row < rows { weight(row, col) } else { 0.0 };
        let weights = match kind {
            LinearKind::F32 => Weights::F32(panels(rows, cols, held)),
            LinearKind::Bf16 => Weights::Bf16(panels(rows, cols, |row, col| bf16::from_f32(held(row, col)))),
            LinearKind::Fp8 | LinearKind::W8a8 => Weights::Fp8(
                panels(rows, cols, |row, col| fp8::encode(held(row, col) / scale)),
                vec![[scale; WIDTH]; rows.div_ceil(WIDTH) * cols.div_ceil(FP8_GROUP)],
            ),
        };
        let (matrix, cores) = (Matrix::new(rows, cols, weights), Cores::new(threads)?);
        let (quantises, scratch) = (kind == LinearKind::W8a8, QuantiseScratch::default());
        Ok(Self { rows, cols, matrix, quantises, cores, scratch })
    }

    /// `out = x * weights^T` of `x` `[tokens, cols]` and `out` `[tokens, rows]`.
    ///
    /// # Errors
    /// [`ModelError::Length`] for buffers that do not fit.
    pub fn apply(&mut self, x: &[f32], out: &mut [f32]) -> Result<(), ModelError> {
        let tokens = x.len().div_ceil(self.cols.max(1));
        check_len("x", x.len(), tokens * self.cols)?;
        check_len("out", out.len(), tokens * self.rows)?;
        self.matrix.apply(&self.cores, self.scratch.activations(self.quantises, x, self.cols), out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_multiplies_and_refuses_buffers_that_do_not_fit() {
        let (rows, cols) = (21, 130);
        let weight = |row: usize, col: usize| if row == col { 1.0 } else { 0.0 };
        let x: Vec<f32> = (0..2 * cols).map(|i| (i % 8) as f32).collect();
        for kind in LinearKind::ALL {
            let mut layer = Linear::new(rows, cols, kind, 1, 0.5, weight).unwrap();
            let mut out = vec![0.0; 2 * rows];
            layer.apply(&x, &mut out).unwrap();
            for (i, value) in out.iter().enumerate() {
                assert!((value - x[i / rows * cols + i % rows]).abs() < 0.3, "{} {i}: {value}", kind.name());
            }
            assert!(layer.apply(&x[1..], &mut out).is_err() && layer.apply(&x, &mut out[1..]).is_err());
        }
        assert!(Linear::new(1, 1, LinearKind::F32, 0, 1.0, weight).is_err());
    }
}
