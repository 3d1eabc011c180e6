//! Weights from a checkpoint into the compute type, whole or the part that a shard holds.

use std::ops::Range;

use crate::kernel::{Matrix, Values};
use crate::{Checkpoint, Dtype, ModelError};

use super::mlp::Mlp;
use crate::dtype::{round_bf16, to_bf16};

/// A checkpoint seen through a compute type.
#[derive(Clone, Copy)]
pub(super) struct Loader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) dtype: Dtype,
}

impl Loader<'_> {
    /// A whole matrix `[rows, cols]`.
    pub(super) fn matrix(self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        self.rectangle(name, &[rows, cols], 0..rows, 0..cols)
    }

    /// A norm's weight `[width]`, as f32 values of the compute type.
    pub(super) fn norm(self, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
        let mut weight = Vec::new();
        let tensor = self.checkpoint.tensor(name, &[width])?;
        match self.dtype {
            Dtype::F32 => tensor.read(0..1, 0..width, &mut weight, |value| value)?,
            Dtype::Bf16 => tensor.read(0..1, 0..width, &mut weight, round_bf16)?,
        }
        Ok(weight)
    }

    /// The `width` part of a gated MLP `prefix.{gate,up,down}_proj.weight` of full width `full`.
    pub(super) fn mlp(self, prefix: &str, hidden: usize, full: usize, width: Range<usize>) -> Result<Mlp, ModelError> {
        let inward = |part: &str| {
            self.rectangle(&format!("{prefix}.{part}_proj.weight"), &[full, hidden], width.clone(), 0..hidden)
        };
        Ok(Mlp {
            gate: inward("gate")?,
            up: inward("up")?,
            down: self.rectangle(&format!("{prefix}.down_proj.weight"), &[hidden, full], 0..hidden, width.clone())?,
            width: width.len(),
        })
    }

    /// Expert `expert` of `experts` gated MLPs that are stacked on the first dimension.
    pub(super) fn stacked_mlp(
        self,
        prefix: &str,
        hidden: usize,
        width: usize,
        experts: usize,
        expert: usize,
    ) -> Result<Mlp, ModelError> {
        let one = |part: &str, rows: usize, cols: usize| {
            let name = format!("{prefix}.{part}_proj.weight");
            self.rectangle(&name, &[experts, rows, cols], expert * rows..(expert + 1) * rows, 0..cols)
        };
        Ok(Mlp {
            gate: one("gate", width, hidden)?,
            up: one("up", width, hidden)?,
            down: one("down", hidden, width)?,
            width,
        })
    }

    fn rectangle(
        self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Matrix, ModelError> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        let width = cols.len();
        let values = match self.dtype {
            Dtype::F32 => {
                let mut values = Vec::new();
                tensor.read(rows, cols, &mut values, |value| value)?;
                Values::F32(values)
            }
            Dtype::Bf16 => {
                let mut values = Vec::new();
                tensor.read(rows, cols, &mut values, to_bf16)?;
                Values::Bf16(values)
            }
        };
        Ok(Matrix::new(width, values))
    }
}
