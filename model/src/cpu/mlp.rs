//! The gated MLP that dense layers, routed experts and the shared expert are made of.

use crate::Dtype;
use crate::kernel::{Activations, Cores, Matrix, QuantiseScratch, silu_times};

use super::room;

/// `down(silu(gate x) * up x)`, or the part of it that a range of the intermediate dimension contributes.
#[derive(Debug)]
pub(super) struct Mlp {
    /// `[width, hidden]`.
    pub(super) gate: Matrix,
    /// `[width, hidden]`.
    pub(super) up: Matrix,
    /// `[hidden, width]`.
    pub(super) down: Matrix,
    /// The part of the intermediate dimension that is held.
    pub(super) width: usize,
}

/// Intermediate rows, kept between calls.
#[derive(Debug, Default)]
pub(super) struct MlpScratch {
    gate: Vec<f32>,
    up: Vec<f32>,
    quantised: QuantiseScratch,
}

impl Mlp {
    /// `out` `[rows, hidden]` from `x` `[rows, hidden]`, rounded as `dtype` says.
    pub(super) fn apply(
        &self,
        cores: &Cores,
        dtype: Dtype,
        x: Activations<'_>,
        rows: usize,
        scratch: &mut MlpScratch,
        out: &mut [f32],
    ) {
        let gate = room(&mut scratch.gate, rows * self.width);
        let up = room(&mut scratch.up, rows * self.width);
        self.gate.apply(cores, x, gate);
        self.up.apply(cores, x, up);
        dtype.round_all(gate);
        dtype.round_all(up);
        silu_times(dtype, gate, up);
        let quantise = dtype.quantises() && self.down.is_fp8();
        self.down.apply(cores, scratch.quantised.activations(quantise, gate, self.width), out);
        dtype.round_all(out);
    }

    pub(super) fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}
