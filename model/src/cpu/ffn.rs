//! The FFN side on the CPU, whole or one shard of it.

use crate::kernel::Isa;
use crate::stage::{FfnInput, FfnStage, check_len};
use crate::{Checkpoint, Dtype, ModelConfig, ModelError, Shard};

use super::load::Loader;
use super::mlp::{Mlp, MlpScratch};
use super::room;

/// Experts, shared experts and dense layers, or one shard's part of them, in host memory.
///
/// Routed experts are shared out whole; the shared expert and dense layers are cut along the intermediate dimension.
#[derive(Debug)]
pub struct CpuFfn {
    config: ModelConfig,
    dtype: Dtype,
    isa: Isa,
    shard: Shard,
    layers: Vec<Layer>,
    scratch: Scratch,
}

#[derive(Debug)]
enum Layer {
    Dense(Mlp),
    Moe {
        /// The shard's experts, the first of which is number `first`.
        first: usize,
        experts: Vec<Mlp>,
        shared: Mlp,
    },
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
    input: Vec<f32>,
    /// Sorted by expert, then row.
    visits: Vec<Visit>,
    /// The rows that visit one expert.
    gathered: Vec<f32>,
    result: Vec<f32>,
    mlp: MlpScratch,
}

impl CpuFfn {
    /// Loads the part of `checkpoint`'s FFN side that `shard` holds, converted to `dtype`; reads no other weights.
    ///
    /// # Errors
    /// Names the tensor that is missing, misshapen, of an unknown type, or not finite.
    pub fn load(checkpoint: &Checkpoint, dtype: Dtype, shard: Shard) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let loader = Loader { checkpoint, dtype };
        let layers = (0..config.num_layers).map(|layer| Layer::load(loader, &config, shard, layer));
        let layers = layers.collect::<Result<_, _>>()?;
        Ok(Self { dtype, isa: Isa::detect(), shard, layers, scratch: Scratch::default(), config })
    }
}

impl Layer {
    fn load(loader: Loader<'_>, config: &ModelConfig, shard: Shard, layer: usize) -> Result<Self, ModelError> {
        let hidden = config.hidden_size;
        let prefix = format!("model.layers.{layer}");
        if !config.is_moe(layer) {
            let full = config.intermediate_size;
            return Ok(Self::Dense(loader.mlp(&format!("{prefix}.mlp"), hidden, full, shard.range(full))?));
        }
        let held = shard.experts(config);
        let first = held.start;
        let stacked = format!("{prefix}.moe");
        let expert = |e| loader.stacked_mlp(&stacked, hidden, config.moe_intermediate_size, config.num_experts, e);
        let full = config.share_expert_dim;
        Ok(Self::Moe {
            first,
            experts: held.map(expert).collect::<Result<_, _>>()?,
            shared: loader.mlp(&format!("{prefix}.share_expert"), hidden, full, shard.range(full))?,
        })
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
        let bytes = |layer: &Layer| match layer {
            Layer::Dense(mlp) => mlp.bytes(),
            Layer::Moe { experts, shared, .. } => experts.iter().map(Mlp::bytes).sum::<usize>() + shared.bytes(),
        };
        self.layers.iter().map(bytes).sum()
    }

    fn forward(&mut self, layer: usize, segments: &[FfnInput<'_>], out: &mut [f32]) -> Result<(), ModelError> {
        let Self { config, dtype, isa, layers, scratch, .. } = self;
        let (dtype, isa, hidden) = (*dtype, *isa, config.hidden_size);
        let weights = layers.get(layer).ok_or(ModelError::Layer { layer, reason: "does not exist" })?;
        let top_k = if matches!(weights, Layer::Moe { .. }) { config.top_k } else { 0 };
        let rows = check_segments(config, top_k, segments)?;
        check_len("out", out.len(), rows * hidden)?;

        let Scratch { input, visits, gathered, result, mlp: mlp_scratch } = scratch;
        let input = room(input, rows * hidden);
        let mut first_row = 0;
        for segment in segments {
            input[first_row * hidden..][..segment.hidden.len()].copy_from_slice(segment.hidden);
            first_row += segment.hidden.len() / hidden;
        }
        let (first, experts, shared) = match weights {
            Layer::Dense(mlp) => {
                mlp.apply(isa, dtype, input, rows, mlp_scratch, out);
                return Ok(());
            }
            Layer::Moe { first, experts, shared } => (*first, experts, shared),
        };

        out.fill(0.0);
        sort_visits(segments, top_k, first..first + experts.len(), visits);
        for visits in visits.chunk_by(|a, b| a.expert == b.expert) {
            let gathered = room(gathered, visits.len() * hidden);
            for (visit, to) in visits.iter().zip(gathered.chunks_exact_mut(hidden)) {
                to.copy_from_slice(&input[visit.row as usize * hidden..][..hidden]);
            }
            let result = room(result, visits.len() * hidden);
            let expert = &experts[usize::from(visits[0].expert) - first];
            expert.apply(isa, dtype, gathered, visits.len(), mlp_scratch, result);
            for (visit, result) in visits.iter().zip(result.chunks_exact(hidden)) {
                let out = &mut out[visit.row as usize * hidden..][..hidden];
                for (out, value) in out.iter_mut().zip(result) {
                    *out = dtype.round(*out + dtype.round(visit.weight * value));
                }
            }
        }
        let result = room(result, rows * hidden);
        shared.apply(isa, dtype, input, rows, mlp_scratch, result);
        for (out, value) in out.iter_mut().zip(result) {
            *out = dtype.round(*out + *value);
        }
        Ok(())
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

/// Refuses what a peer may have sent wrong; returns the number of rows.
fn check_segments(config: &ModelConfig, top_k: usize, segments: &[FfnInput<'_>]) -> Result<usize, ModelError> {
    let mut total = 0;
    for (segment, input) in segments.iter().enumerate() {
        let rows = input.hidden.len().div_ceil(config.hidden_size);
        check_len("hidden", input.hidden.len(), rows * config.hidden_size)?;
        check_len("experts", input.experts.len(), rows * top_k)?;
        check_len("weights", input.weights.len(), rows * top_k)?;
        total += rows;
        if top_k == 0 {
            continue;
        }
        let choices = input.experts.chunks_exact(top_k).zip(input.weights.chunks_exact(top_k));
        for (row, (experts, weights)) in choices.enumerate() {
            for (i, (&expert, &weight)) in experts.iter().zip(weights).enumerate() {
                if usize::from(expert) >= config.num_experts {
                    return Err(ModelError::Expert { segment, row, expert, reason: "does not exist" });
                }
                if experts[..i].contains(&expert) {
                    return Err(ModelError::Expert { segment, row, expert, reason: "is named twice" });
                }
                if !weight.is_finite() {
                    return Err(ModelError::ExpertWeight { segment, row, expert, weight });
                }
            }
        }
    }
    Ok(total)
}
