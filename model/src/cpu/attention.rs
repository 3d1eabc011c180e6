//! The attention side on the CPU.

use crate::cache::{AttendScratch, Query};
use crate::kernel::{Activations, Cores, Matrix, QuantiseScratch, Softmax, Table, rms_norm, rotate};
use crate::load::load;
use crate::stage::{AttentionStage, Row, check_len, check_tokens, whole_rows};
use crate::weights::AttentionLayer;
use crate::{Checkpoint, Dtype, KvCache, LoadOptions, LoadProgress, ModelConfig, ModelError};

use super::room;

/// Embedding, attention, norms, routers and output head of the whole model, in host memory.
#[derive(Debug)]
pub struct CpuAttention {
    config: ModelConfig,
    dtype: Dtype,
    cores: Cores,
    weights: Weights,
    /// Rotary frequencies `[head_dim / 2]`, in radians a position.
    frequencies: Vec<f32>,
    scratch: Scratch,
}

#[derive(Debug)]
struct Weights {
    embedding: Table,
    layers: Vec<AttentionLayer<Matrix>>,
    final_norm: Vec<f32>,
    head: Matrix,
}

/// Buffers kept between calls.
#[derive(Debug, Default)]
struct Scratch {
    normed: Vec<f32>,
    low_rank: Vec<f32>,
    low_rank_normed: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    heads: Vec<f32>,
    scores: Vec<f32>,
    attend: AttendScratch,
    cos: Vec<f32>,
    sin: Vec<f32>,
    quantised: QuantiseScratch,
}

impl CpuAttention {
    /// Loads the attention side of `checkpoint`.
    ///
    /// # Errors
    /// Names the tensor that is missing, misshapen, of an unknown type, or not finite.
    pub fn load(checkpoint: &Checkpoint, dtype: Dtype) -> Result<Self, ModelError> {
        Self::load_with(checkpoint, LoadOptions::new(dtype), &mut |_| {})
    }

    /// As [`CpuAttention::load`], with all options; `observe` hears how far it is.
    ///
    /// # Errors
    /// As [`CpuAttention::load`]; [`ModelError::Threads`].
    pub fn load_with(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        observe: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let cores = Cores::new(options.threads)?;
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let weights = load(checkpoint, options.dtype, observe, |loader| {
            Ok(Weights {
                embedding: Table::new(hidden, loader.table("model.embed_tokens.weight", vocabulary, hidden)?),
                layers: (0..config.num_layers)
                    .map(|layer| AttentionLayer::load(loader, &config, layer))
                    .collect::<Result<_, _>>()?,
                final_norm: loader.norm("model.norm.weight", hidden)?,
                head: loader.matrix("lm_head.weight", vocabulary, hidden)?,
            })
        })?;
        let frequency = |i: usize| 1.0 / config.rope_theta.powf((2 * i) as f32 / config.head_dim as f32);
        let frequencies = (0..config.head_dim / 2).map(frequency).collect();
        Ok(Self { dtype: options.dtype, cores, weights, frequencies, scratch: Scratch::default(), config })
    }
}

impl AttentionStage for CpuAttention {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn weight_bytes(&self) -> usize {
        let Weights { embedding, layers, final_norm, head } = &self.weights;
        let layers: usize = layers.iter().map(bytes).sum();
        layers + embedding.bytes() + head.bytes() + size_of_val(final_norm.as_slice())
    }

    fn embed(&mut self, tokens: &[u32], x: &mut [f32]) -> Result<(), ModelError> {
        check_len("x", x.len(), tokens.len() * self.config.hidden_size)?;
        check_tokens(&self.config, tokens)?;
        for (token, x) in tokens.iter().zip(x.chunks_exact_mut(self.config.hidden_size)) {
            self.weights.embedding.copy_row(*token as usize, x);
        }
        Ok(())
    }

    fn attention(
        &mut self,
        layer: usize,
        rows: &[Row],
        x: &mut [f32],
        cache: &mut KvCache,
        y: &mut [f32],
    ) -> Result<(), ModelError> {
        let Self { config, dtype, cores, weights, frequencies, scratch, .. } = self;
        let (dtype, eps) = (*dtype, config.rms_norm_eps);
        let weights = weights.layers.get(layer).ok_or(ModelError::Layer { layer, reason: "does not exist" })?;
        check_len("x", x.len(), rows.len() * config.hidden_size)?;
        check_len("y", y.len(), x.len())?;
        cache.check(config, dtype, false, layer, rows)?;

        let (count, head_dim) = (rows.len(), config.head_dim);
        let normed = room(&mut scratch.normed, x.len());
        let low_rank = room(&mut scratch.low_rank, count * config.share_q_dim);
        let low_rank_normed = room(&mut scratch.low_rank_normed, low_rank.len());
        let query = room(&mut scratch.query, count * config.num_heads * head_dim);
        let key = room(&mut scratch.key, count * head_dim);
        let value = room(&mut scratch.value, count * head_dim);
        let heads = room(&mut scratch.heads, query.len());

        rms_norm(dtype, x, &weights.input_norm, eps, normed);
        let input = scratch.quantised.activations(dtype.quantises(), normed, config.hidden_size);
        linear(cores, dtype, &weights.query_down, input, low_rank);
        linear(cores, dtype, &weights.key, input, key);
        linear(cores, dtype, &weights.value, input, value);
        rms_norm(dtype, low_rank, &weights.query_norm, eps, low_rank_normed);
        let input = scratch.quantised.activations(dtype.quantises(), low_rank_normed, config.share_q_dim);
        linear(cores, dtype, &weights.query_up, input, query);

        let per_row = query.chunks_exact_mut(config.num_heads * head_dim).zip(key.chunks_exact_mut(head_dim));
        for ((row, (query, key)), value) in rows.iter().zip(per_row).zip(value.chunks_exact(head_dim)) {
            let (cos, sin) = (room(&mut scratch.cos, head_dim / 2), room(&mut scratch.sin, head_dim / 2));
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin.iter_mut()).zip(&*frequencies) {
                let (s, c) = (row.position as f32 * frequency).sin_cos();
                (*cos, *sin) = (dtype.round(c), dtype.round(s));
            }
            query.chunks_exact_mut(head_dim).for_each(|head| rotate(dtype, head, cos, sin));
            rotate(dtype, key, cos, sin);
            cache.store(layer, *row, key, value);
        }

        let per_row =
            query.chunks_exact(config.num_heads * head_dim).zip(heads.chunks_exact_mut(config.num_heads * head_dim));
        for (row, (query, heads)) in rows.iter().zip(per_row) {
            cache.attend(cores.isa, Query { layer, row: *row, heads: query }, &mut scratch.attend, heads);
        }
        dtype.round_all(heads);
        let input = scratch.quantised.activations(dtype.quantises(), heads, config.num_heads * head_dim);
        linear(cores, dtype, &weights.output, input, normed);
        for (x, a) in x.iter_mut().zip(&*normed) {
            *x = dtype.round(*x + a);
        }
        rms_norm(dtype, x, &weights.post_norm, eps, y);
        Ok(())
    }

    fn route(&mut self, layer: usize, y: &[f32], ids: &mut [u16], weights: &mut [f32]) -> Result<(), ModelError> {
        let rows = whole_rows(&self.config, "y", y.len())?;
        let Self { config, dtype, cores, weights: all, scratch, .. } = self;
        let router = match all.layers.get(layer) {
            None => return Err(ModelError::Layer { layer, reason: "does not exist" }),
            Some(AttentionLayer { router: None, .. }) => {
                return Err(ModelError::Layer { layer, reason: "is dense; it has no router" });
            }
            Some(AttentionLayer { router: Some(router), .. }) => router,
        };
        check_len("ids", ids.len(), rows * config.top_k)?;
        check_len("weights", weights.len(), rows * config.top_k)?;
        let scores = room(&mut scratch.scores, rows * config.num_experts);
        linear(cores, *dtype, router, plain(y), scores);
        if let Some(i) = scores.iter().position(|score| !score.is_finite()) {
            return Err(ModelError::NonFiniteRow { argument: "y", row: i / config.num_experts });
        }
        let chosen = ids.chunks_exact_mut(config.top_k).zip(weights.chunks_exact_mut(config.top_k));
        for (scores, (ids, weights)) in scores.chunks_exact_mut(config.num_experts).zip(chosen) {
            let mut softmax = Softmax::NEW;
            softmax.go_on(scores, 1.0);
            scores.iter_mut().for_each(|p| *p /= softmax.sum);
            top_k(scores, ids, weights);
            if config.norm_expert_weight {
                let sum: f32 = weights.iter().sum();
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
            dtype.round_all(weights);
        }
        Ok(())
    }

    fn combine(&mut self, x: &mut [f32], partials: &[&[f32]]) -> Result<(), ModelError> {
        whole_rows(&self.config, "x", x.len())?;
        for partial in partials {
            check_len("partial", partial.len(), x.len())?;
        }
        let Some((first, rest)) = partials.split_first() else { return Ok(()) };
        for (i, x) in x.iter_mut().enumerate() {
            let f = rest.iter().fold(first[i], |sum, partial| sum + partial[i]);
            *x = self.dtype.round(*x + self.dtype.round(f));
        }
        Ok(())
    }

    fn logits(&mut self, x: &[f32], logits: &mut [f32]) -> Result<(), ModelError> {
        let rows = whole_rows(&self.config, "x", x.len())?;
        check_len("logits", logits.len(), rows * self.config.vocab_size)?;
        let normed = room(&mut self.scratch.normed, x.len());
        rms_norm(self.dtype, x, &self.weights.final_norm, self.config.rms_norm_eps, normed);
        linear(&self.cores, self.dtype, &self.weights.head, plain(normed), logits);
        Ok(())
    }
}

/// Bytes of a layer's weights.
fn bytes(layer: &AttentionLayer<Matrix>) -> usize {
    let matrices = [&layer.query_down, &layer.key, &layer.value, &layer.query_up, &layer.output];
    let norms = [&layer.input_norm, &layer.query_norm, &layer.post_norm];
    matrices.into_iter().chain(&layer.router).map(Matrix::bytes).sum::<usize>()
        + norms.into_iter().map(|norm| size_of_val(norm.as_slice())).sum::<usize>()
}

/// `out = x * matrix^T`, rounded.
fn linear(cores: &Cores, dtype: Dtype, matrix: &Matrix, x: Activations<'_>, out: &mut [f32]) {
    matrix.apply(cores, x, out);
    dtype.round_all(out);
}

/// Rows for weights that are never FP8.
fn plain(x: &[f32]) -> Activations<'_> {
    Activations { plain: x, quantised: None }
}

/// The largest probabilities and their indices, largest first, the lower index first among equals. Takes them out of
/// `probabilities`, all of which are zero or more.
fn top_k(probabilities: &mut [f32], ids: &mut [u16], weights: &mut [f32]) {
    for (id, weight) in ids.iter_mut().zip(weights) {
        let mut best = (0, -1.0);
        for (expert, p) in probabilities.iter().enumerate() {
            if *p > best.1 {
                best = (expert, *p);
            }
        }
        (*id, *weight) = (best.0 as u16, best.1);
        probabilities[best.0] = -1.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_k_takes_the_lower_index_among_equals() {
        let (mut ids, mut weights) = ([9; 3], [0.0; 3]);
        top_k(&mut [0.1, 0.3, 0.1, 0.3, 0.2], &mut ids, &mut weights);
        assert_eq!((ids, weights), ([1, 3, 4], [0.3, 0.3, 0.2]));
        top_k(&mut [1.0, 0.0, 0.0, 0.0], &mut ids, &mut weights);
        assert_eq!((ids, weights), ([0, 1, 2], [1.0, 0.0, 0.0]));
    }
}
