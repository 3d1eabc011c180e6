//! The two sides of a layer as traits: what a pipeline drives, and what a CPU or a GPU implements.
//!
//! A hidden state is a row of `hidden_size` f32 values; matrices of rows are dense and row-major. A layer is
//! [`attention`](AttentionStage::attention), [`route`](AttentionStage::route) on a MoE layer,
//! [`forward`](FfnStage::forward) on every FFN instance, and [`combine`](AttentionStage::combine).

use crate::fp8::fp8_groups;
use crate::{Dtype, KvCache, ModelConfig, ModelError, SequenceId, Shard};

/// One token of a batch: which sequence it belongs to and where it stands in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The sequence's place in the cache.
    pub sequence: SequenceId,
    /// Position in the sequence, from 0.
    pub position: usize,
}

/// The attention side: embedding, attention with its cache, router, residual stream, output head.
///
/// A row's results never depend on what else is in the batch. A call that fails has changed neither `x` nor the cache.
pub trait AttentionStage: Send {
    /// The model's shape.
    fn config(&self) -> &ModelConfig;

    /// The type that activations are rounded to and that the cache must have.
    fn dtype(&self) -> Dtype;

    /// Bytes of the weights that this instance holds.
    fn weight_bytes(&self) -> usize;

    /// A cache for at least `tokens` tokens, where this stage keeps it.
    ///
    /// # Errors
    /// As [`KvCache::new`].
    fn new_cache(&self, tokens: usize) -> Result<KvCache, ModelError> {
        KvCache::new(self.config(), self.dtype(), tokens)
    }

    /// Looks `tokens` up: `x` `[tokens, hidden]` is the residual stream that enters layer 0.
    ///
    /// # Errors
    /// A token outside the vocabulary; `x` of another length.
    fn embed(&mut self, tokens: &[u32], x: &mut [f32]) -> Result<(), ModelError>;

    /// The attention half of `layer` for a batch of rows: adds the attention output to `x` `[rows, hidden]` and writes
    /// its post-attention norm, which the FFN side takes, to `y` `[rows, hidden]`.
    ///
    /// Rows of any sequences may be mixed; the rows of one sequence must be in the order of their positions, without
    /// gaps, and continue what the cache holds for this layer. A position that the cache holds already is written anew,
    /// and the later ones of that sequence and layer are forgotten, so that a step can be run again.
    ///
    /// # Errors
    /// A layer, sequence or position that does not exist; a cache of another model; buffers of other lengths.
    fn attention(
        &mut self,
        layer: usize,
        rows: &[Row],
        x: &mut [f32],
        cache: &mut KvCache,
        y: &mut [f32],
    ) -> Result<(), ModelError>;

    /// The router of MoE layer `layer`: for each row of `y` `[rows, hidden]` the `top_k` experts in `ids`
    /// `[rows, top_k]`, most likely first, the lower index first among equals, and their probabilities over all experts
    /// in `weights` `[rows, top_k]`, divided by their sum only if the model says so.
    ///
    /// # Errors
    /// A dense layer; buffers of other lengths; a row that is not finite.
    fn route(&mut self, layer: usize, y: &[f32], ids: &mut [u16], weights: &mut [f32]) -> Result<(), ModelError>;

    /// Ends a layer: `x += partials[0] + partials[1] + ...`, the partial results `[rows, hidden]` of the FFN instances
    /// summed in the order given before they are added to `x`.
    ///
    /// # Errors
    /// A partial result of another length than `x`.
    fn combine(&mut self, x: &mut [f32], partials: &[&[f32]]) -> Result<(), ModelError>;

    /// Logits `[rows, vocab_size]` of the rows of `x` `[rows, hidden]`, as they leave the last layer.
    ///
    /// # Errors
    /// Buffers of other lengths.
    fn logits(&mut self, x: &[f32], logits: &mut [f32]) -> Result<(), ModelError>;
}

/// Rows of hidden states as they arrive.
#[derive(Debug, Clone, Copy)]
pub enum Hidden<'a> {
    /// Values `[rows, hidden]`.
    Plain(&'a [f32]),
    /// Quantised by [`quantise_rows`](crate::quantise_rows).
    Fp8 {
        /// E4M3 codes `[rows, hidden]`.
        codes: &'a [u8],
        /// Scales `[rows, fp8_groups(hidden)]`.
        scales: &'a [f32],
    },
}

impl Hidden<'_> {
    /// Elements in all rows.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Plain(values) => values.len(),
            Self::Fp8 { codes, .. } => codes.len(),
        }
    }
}

/// What one attention instance sends to the FFN side: a segment of its batch.
#[derive(Debug, Clone, Copy)]
pub struct FfnInput<'a> {
    /// Post-attention norms; zero rows are legal.
    pub hidden: Hidden<'a>,
    /// Experts of each row `[rows, top_k]`; empty for a dense layer.
    pub experts: &'a [u16],
    /// Weights of these experts `[rows, top_k]`; empty for a dense layer.
    pub weights: &'a [f32],
}

/// The FFN side, or one shard of it: dense layers, routed experts, shared expert.
///
/// A row's result never depends on what else is in the batch, nor on how the batch is cut into segments.
pub trait FfnStage: Send {
    /// The model's shape.
    fn config(&self) -> &ModelConfig;

    /// The part of the FFN side that this instance holds.
    fn shard(&self) -> Shard;

    /// Bytes of the weights that this instance holds.
    fn weight_bytes(&self) -> usize;

    /// This shard's part of `layer`'s output for all segments, one after the other: `out` `[total rows, hidden]`. The
    /// layer's output is the sum over all shards.
    ///
    /// # Errors
    /// A layer that does not exist; an expert that does not exist or that a row names twice; a weight that is not
    /// finite; buffers of other lengths. Nothing is computed then.
    fn forward(&mut self, layer: usize, segments: &[FfnInput<'_>], out: &mut [f32]) -> Result<(), ModelError>;
}

/// Refuses a token that is not of the vocabulary.
pub(crate) fn check_tokens(config: &ModelConfig, tokens: &[u32]) -> Result<(), ModelError> {
    let vocab_size = config.vocab_size;
    match tokens.iter().position(|token| *token as usize >= vocab_size) {
        Some(row) => Err(ModelError::Token { token: tokens[row], row, vocab_size }),
        None => Ok(()),
    }
}

/// The rows of hidden states in a buffer of `found` elements.
pub(crate) fn whole_rows(config: &ModelConfig, argument: &'static str, found: usize) -> Result<usize, ModelError> {
    let rows = found.div_ceil(config.hidden_size);
    check_len(argument, found, rows * config.hidden_size)?;
    Ok(rows)
}

/// Checks the length of a buffer that a caller handed in.
pub(crate) fn check_len(argument: &'static str, found: usize, expected: usize) -> Result<(), ModelError> {
    if found == expected { Ok(()) } else { Err(ModelError::Length { argument, found, expected }) }
}

/// Refuses what a peer may have sent wrong; returns the number of rows.
pub(crate) fn check_segments(
    config: &ModelConfig,
    top_k: usize,
    segments: &[FfnInput<'_>],
) -> Result<usize, ModelError> {
    let mut total = 0;
    for (segment, input) in segments.iter().enumerate() {
        let rows = input.hidden.len().div_ceil(config.hidden_size);
        check_len("hidden", input.hidden.len(), rows * config.hidden_size)?;
        if let Hidden::Fp8 { scales, .. } = input.hidden {
            check_len("scales", scales.len(), rows * fp8_groups(config.hidden_size))?;
        }
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
