//! The gated MLP on the CPU.

use crate::Dtype;
use crate::kernel::{Activations, Cores, Matrix, QuantiseScratch, silu_times};

use super::room;
use crate::mlp::Mlp;

/// Intermediate rows, kept between calls.
#[derive(Debug, Default)]
pub(super) struct MlpScratch {
    gate: Vec<f32>,
    up: Vec<f32>,
    quantised: QuantiseScratch,
}

impl Mlp<Matrix> {
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
