//! The FFN side on the CPU, whole or one shard of it.

use crate::fp8::{self, fp8_groups};
use crate::kernel::{Activations, Cores, Matrix};
use crate::load::load;
use crate::mlp::Mlp;
use crate::stage::{FfnInput, FfnStage, Hidden, check_len, check_segments};
use crate::weights::FfnLayer as Layer;
use crate::{Checkpoint, Dtype, LoadOptions, LoadProgress, ModelConfig, ModelError, Shard};

use super::mlp::MlpScratch;
use super::room;

/// Experts, shared experts and dense layers, or one shard's part of them, in host memory.
///
/// Routed experts are shared out whole; the shared expert and dense layers are cut along the intermediate dimension.
#[derive(Debug)]
pub struct CpuFfn {
    config: ModelConfig,
    dtype: Dtype,
    cores: Cores,
    shard: Shard,
    layers: Vec<Layer<Matrix>>,
    scratch: Scratch,
}

/// One row's visit to one expert.
#[derive(Debug, Clone, Copy)]
struct Visit {
    expert: u16,
    row: u32,
    weight: f32,
}

/// Buffers kept between calls.
#[derive(Debug, Default)]
struct Scratch {
    /// All segments' rows, one after the other.
    input: Rows,
    /// Sorted by expert, then row.
    visits: Vec<Visit>,
    /// The rows that visit one expert.
    gathered: Rows,
    result: Vec<f32>,
    mlp: MlpScratch,
}

impl CpuFfn {
    /// Loads the part of `checkpoint`'s FFN side that `shard` holds; reads no other weights.
    ///
    /// # Errors
    /// Names the tensor that is missing, misshapen, of an unknown type, or not finite.
    pub fn load(checkpoint: &Checkpoint, dtype: Dtype, shard: Shard) -> Result<Self, ModelError> {
        Self::load_with(checkpoint, LoadOptions::new(dtype), shard, &mut |_| {})
    }

    /// As [`CpuFfn::load`], with all options; `observe` hears how far it is.
    ///
    /// # Errors
    /// As [`CpuFfn::load`]; [`ModelError::Threads`].
    pub fn load_with(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        shard: Shard,
        observe: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let cores = Cores::new(options.threads)?;
        let layers = load(checkpoint, options.dtype, observe, |loader| {
            (0..config.num_layers).map(|layer| Layer::load(loader, &config, shard, layer)).collect()
        })?;
        Ok(Self { dtype: options.dtype, cores, shard, layers, scratch: Scratch::default(), config })
    }
}

impl FfnStage for CpuFfn {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn shard(&self) -> Shard {
        self.shard
    }

    fn weight_bytes(&self) -> usize {
        let bytes = |layer: &Layer<Matrix>| match layer {
            Layer::Dense(mlp) => mlp.bytes(),
            Layer::Moe { experts, shared, .. } => experts.iter().map(Mlp::bytes).sum::<usize>() + shared.bytes(),
        };
        self.layers.iter().map(bytes).sum()
    }

    fn forward(&mut self, layer: usize, segments: &[FfnInput<'_>], out: &mut [f32]) -> Result<(), ModelError> {
        let Self { config, dtype, cores, layers, scratch, .. } = self;
        let (dtype, hidden) = (*dtype, config.hidden_size);
        let weights = layers.get(layer).ok_or(ModelError::Layer { layer, reason: "does not exist" })?;
        let top_k = if matches!(weights, Layer::Moe { .. }) { config.top_k } else { 0 };
        let rows = check_segments(config, top_k, segments)?;
        check_len("out", out.len(), rows * hidden)?;

        let Scratch { input, visits, gathered, result, mlp: mlp_scratch } = scratch;
        input.take(dtype, hidden, rows, segments);
        let (first, experts, shared) = match weights {
            Layer::Dense(mlp) => {
                mlp.apply(cores, dtype, input.activations(dtype, hidden, rows), rows, mlp_scratch, out);
                return Ok(());
            }
            Layer::Moe { first, experts, shared } => (*first, experts, shared),
        };

        out.fill(0.0);
        sort_visits(segments, top_k, first..first + experts.len(), visits);
        for visits in visits.chunk_by(|a, b| a.expert == b.expert) {
            gathered.gather(dtype, hidden, input, visits.iter().map(|visit| visit.row as usize));
            let result = room(result, visits.len() * hidden);
            let expert = &experts[usize::from(visits[0].expert) - first];
            let activations = gathered.activations(dtype, hidden, visits.len());
            expert.apply(cores, dtype, activations, visits.len(), mlp_scratch, result);
            scatter(dtype, hidden, visits, result, out);
        }
        let result = room(result, rows * hidden);
        shared.apply(cores, dtype, input.activations(dtype, hidden, rows), rows, mlp_scratch, result);
        for (out, value) in out.iter_mut().zip(result) {
            *out = dtype.round(*out + *value);
        }
        Ok(())
    }
}

/// Rows of hidden states, and the same quantised where FP8 weights take them so.
#[derive(Debug, Default)]
struct Rows {
    /// `[rows, hidden]`.
    plain: Vec<f32>,
    /// `[rows, hidden]`, the codes' values.
    codes: Vec<f32>,
    /// `[rows, groups]`.
    scales: Vec<f32>,
}

impl Rows {
    /// Takes all segments in; what arrives quantised is not quantised again.
    fn take(&mut self, dtype: Dtype, hidden: usize, rows: usize, segments: &[FfnInput<'_>]) {
        let groups = fp8_groups(hidden);
        let plain = room(&mut self.plain, rows * hidden);
        let quantised = if dtype.quantises() { rows } else { 0 };
        let (codes, scales) = (room(&mut self.codes, quantised * hidden), room(&mut self.scales, quantised * groups));
        let mut row = 0;
        for segment in segments {
            let count = segment.hidden.len() / hidden;
            let plain = &mut plain[row * hidden..][..count * hidden];
            let (some, all) = (row * hidden..(row + count) * hidden, row * groups..(row + count) * groups);
            row += count;
            match segment.hidden {
                Hidden::Plain(values) => {
                    plain.copy_from_slice(values);
                    if dtype.quantises() {
                        fp8::quantise(values, hidden, &mut scales[all], &mut codes[some]);
                    }
                }
                Hidden::Fp8 { codes: arrived, scales: with } => {
                    fp8::dequantise_rows(arrived, with, hidden, plain);
                    dtype.round_all(plain);
                    if dtype.quantises() {
                        codes[some].iter_mut().zip(arrived).for_each(|(value, code)| *value = fp8::decode(*code));
                        scales[all].copy_from_slice(with);
                    }
                }
            }
        }
    }

    /// Takes some rows of others.
    fn gather(&mut self, dtype: Dtype, hidden: usize, from: &Self, rows: impl ExactSizeIterator<Item = usize>) {
        let groups = fp8_groups(hidden);
        let quantised = if dtype.quantises() { rows.len() } else { 0 };
        let plain = room(&mut self.plain, rows.len() * hidden);
        let (codes, scales) = (room(&mut self.codes, quantised * hidden), room(&mut self.scales, quantised * groups));
        for (to, row) in rows.enumerate() {
            let copy = |to: &mut [f32], place: usize, from: &[f32], width: usize| {
                to[place * width..][..width].copy_from_slice(&from[row * width..][..width]);
            };
            copy(plain, to, &from.plain, hidden);
            if dtype.quantises() {
                copy(codes, to, &from.codes, hidden);
                copy(scales, to, &from.scales, groups);
            }
        }
    }

    fn activations(&self, dtype: Dtype, hidden: usize, rows: usize) -> Activations<'_> {
        let quantised = || (&self.codes[..rows * hidden], &self.scales[..rows * fp8_groups(hidden)]);
        Activations { plain: &self.plain[..rows * hidden], quantised: dtype.quantises().then(quantised) }
    }
}

/// Lists the visits to the experts in `held`, in the order of experts and, for each, of rows: each row then adds up its
/// experts in ascending order, whatever else is in the batch.
fn sort_visits(segments: &[FfnInput<'_>], top_k: usize, held: std::ops::Range<usize>, visits: &mut Vec<Visit>) {
    visits.clear();
    let experts = segments.iter().flat_map(|segment| segment.experts);
    let weights = segments.iter().flat_map(|segment| segment.weights);
    for (i, (expert, weight)) in experts.zip(weights).enumerate() {
        if held.contains(&usize::from(*expert)) {
            visits.push(Visit { expert: *expert, row: (i / top_k) as u32, weight: *weight });
        }
    }
    visits.sort_unstable_by_key(|visit| (visit.expert, visit.row));
}

/// Adds an expert's results, each times its weight, to the rows that visited it.
fn scatter(dtype: Dtype, hidden: usize, visits: &[Visit], results: &[f32], out: &mut [f32]) {
    for (visit, result) in visits.iter().zip(results.chunks_exact(hidden)) {
        let out = &mut out[visit.row as usize * hidden..][..hidden];
        for (out, value) in out.iter_mut().zip(result) {
            *out = dtype.round(*out + dtype.round(visit.weight * value));
        }
    }
}

/// What surrounds the experts of a batch, by itself: visits sorted, each expert's rows gathered, results scattered.
#[derive(Debug)]
pub struct Visits {
    dtype: Dtype,
    hidden: usize,
    experts: usize,
    scratch: Scratch,
}

impl Visits {
    /// For hidden states of so many elements, and so many experts.
    pub fn new(dtype: Dtype, hidden: usize, experts: usize) -> Self {
        Self { dtype, hidden, experts, scratch: Scratch::default() }
    }

    /// Every expert returns what it is given: `out` `[rows, hidden]` becomes each row times the sum of its weights.
    pub fn round(&mut self, segments: &[FfnInput<'_>], top_k: usize, out: &mut [f32]) {
        let Self { dtype, hidden, experts, scratch: Scratch { input, visits, gathered, .. } } = self;
        let (dtype, hidden) = (*dtype, *hidden);
        input.take(dtype, hidden, out.len() / hidden.max(1), segments);
        out.fill(0.0);
        sort_visits(segments, top_k, 0..*experts, visits);
        for visits in visits.chunk_by(|a, b| a.expert == b.expert) {
            gathered.gather(dtype, hidden, input, visits.iter().map(|visit| visit.row as usize));
            scatter(dtype, hidden, visits, &gathered.plain[..visits.len() * hidden], out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_visits_its_experts_and_comes_back() {
        let (rows, hidden, top_k) = (5, 4, 2);
        let values: Vec<f32> = (0..rows * hidden).map(|i| i as f32).collect();
        let experts: Vec<u16> = (0..rows as u16).flat_map(|row| [row % 3, 3 + row % 2]).collect();
        let weights = vec![0.5; rows * top_k];
        let segment = FfnInput { hidden: Hidden::Plain(&values), experts: &experts, weights: &weights };
        let mut out = vec![f32::NAN; values.len()];
        Visits::new(Dtype::F32, hidden, 5).round(&[segment], top_k, &mut out);
        assert_eq!(out, values);
    }
}
