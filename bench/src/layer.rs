//! One MoE layer of the tiny checkpoint on one thread: both sides, with a cache that already holds a context.

use std::path::Path;
use stepmesh_model::{
    AttentionStage, Checkpoint, CpuAttention, CpuFfn, Dtype, FfnInput, FfnStage, Hidden, KvCache, ModelError, Row,
    Shard,
};

/// The layer that is measured: the checkpoint's first MoE layer.
const LAYER: usize = 1;

/// Both sides, and a batch of one row a sequence.
#[derive(Debug)]
pub struct TinyLayer {
    attention: CpuAttention,
    ffn: CpuFfn,
    cache: KvCache,
    rows: Vec<Row>,
    /// Residual stream `[rows, hidden]`, and its values before the layer.
    x: Vec<f32>,
    before: Vec<f32>,
    /// Post-attention norm `[rows, hidden]`.
    y: Vec<f32>,
    /// `[rows, top_k]`.
    experts: Vec<u16>,
    /// `[rows, top_k]`.
    weights: Vec<f32>,
    /// The layer's output `[rows, hidden]`.
    out: Vec<f32>,
}

impl TinyLayer {
    /// Loads the checkpoint and decodes until each of `batch` sequences has a context of `context` tokens.
    ///
    /// # Errors
    /// What the model refuses: a checkpoint that is not there, a context beyond the model's.
    pub fn load(dtype: Dtype, batch: usize, context: usize) -> Result<Self, ModelError> {
        let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/step3-tiny"));
        let checkpoint = Checkpoint::open(directory)?;
        let config = checkpoint.config();
        let tokens_a_sequence = (context + 1).next_multiple_of(stepmesh_model::BLOCK_TOKENS);
        let mut cache = KvCache::new(config, dtype, batch * tokens_a_sequence)?;
        let sequences = (0..batch).map(|_| cache.reserve(context + 1)).collect::<Result<Vec<_>, _>>()?;
        let (hidden, choices) = (batch * config.hidden_size, batch * config.top_k);
        let mut layer = Self {
            attention: CpuAttention::load(&checkpoint, dtype)?,
            ffn: CpuFfn::load(&checkpoint, dtype, Shard::WHOLE)?,
            cache,
            rows: Vec::new(),
            x: vec![0.0; hidden],
            before: vec![0.0; hidden],
            y: vec![0.0; hidden],
            experts: vec![0; choices],
            weights: vec![0.0; choices],
            out: vec![0.0; hidden],
        };
        let tokens: Vec<u32> = (0..batch as u32).map(|token| token % config.vocab_size as u32).collect();
        for position in 0..=context {
            layer.rows = sequences.iter().map(|&sequence| Row { sequence, position }).collect();
            layer.attention.embed(&tokens, &mut layer.before)?;
            layer.step()?;
        }
        Ok(layer)
    }

    /// The attention half: attention at the context's end, and the post-attention norm.
    ///
    /// # Errors
    /// None that [`TinyLayer::load`] has not met.
    pub fn attend(&mut self) -> Result<(), ModelError> {
        self.x.copy_from_slice(&self.before);
        self.attention.attention(LAYER, &self.rows, &mut self.x, &mut self.cache, &mut self.y)
    }

    /// The router.
    ///
    /// # Errors
    /// None that [`TinyLayer::load`] has not met.
    pub fn route(&mut self) -> Result<(), ModelError> {
        self.attention.route(LAYER, &self.y, &mut self.experts, &mut self.weights)
    }

    /// The FFN half, whole on one instance.
    ///
    /// # Errors
    /// None that [`TinyLayer::load`] has not met.
    pub fn feed_forward(&mut self) -> Result<(), ModelError> {
        let input = FfnInput { hidden: Hidden::Plain(&self.y), experts: &self.experts, weights: &self.weights };
        self.ffn.forward(LAYER, &[input], &mut self.out)
    }

    /// Everything between two layers, without a wire.
    ///
    /// # Errors
    /// None that [`TinyLayer::load`] has not met.
    pub fn step(&mut self) -> Result<(), ModelError> {
        self.attend()?;
        self.route()?;
        self.feed_forward()?;
        self.attention.combine(&mut self.x, &[&self.out])
    }

    /// The residual stream `[rows, hidden]` as the layer left it.
    pub fn output(&self) -> &[f32] {
        &self.x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_can_be_repeated_bit_for_bit() {
        let mut layer = TinyLayer::load(Dtype::F32, 2, 3).unwrap();
        let first = layer.output().to_vec();
        layer.step().unwrap();
        assert_eq!(layer.output(), first);
        assert!(first.iter().any(|value| *value != 0.0));
    }
}
