//! An attention stage between host slices: hidden states are encoded into the slots, and partial sums decoded out of them.

use super::compute::Compute;
use crate::DaemonError;
use crate::wire::{self, Wire};
use std::ops::Range;
use stepmesh_mesh::{AttentionMesh, Replies, SendBuffer};
use stepmesh_model::{AttentionStage, KvCache, ModelConfig, Row};

pub(super) struct HostCompute {
    stage: Box<dyn AttentionStage>,
    cache: KvCache,
    wire: Wire,
    microbatches: Vec<Rows>,
    scales: Vec<f32>,
    partials: Vec<Vec<f32>>,
}

#[derive(Clone, Default)]
struct Rows {
    /// Residual stream `[rows, hidden]`.
    x: Vec<f32>,
    /// What the FFN instances get `[rows, hidden]`.
    y: Vec<f32>,
    /// `[rows, top_k]`; none on a dense layer.
    experts: Vec<u16>,
    /// `[rows, top_k]`; none on a dense layer.
    weights: Vec<f32>,
}

impl HostCompute {
    pub(super) fn new(
        stage: Box<dyn AttentionStage>,
        wire: Wire,
        kv_tokens: usize,
        microbatches: u16,
    ) -> Result<Self, DaemonError> {
        let cache = stage.new_cache(kv_tokens)?;
        let microbatches = vec![Rows::default(); microbatches.into()];
        Ok(Self { stage, cache, wire, microbatches, scales: Vec::new(), partials: Vec::new() })
    }
}

impl Compute for HostCompute {
    fn config(&self) -> &ModelConfig {
        self.stage.config()
    }

    fn cache(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    fn fills_slots(&self) -> bool {
        false
    }

    fn begin(&mut self, microbatch: usize, tokens: &[u32], _rows: &[Row]) -> Result<(), DaemonError> {
        let Rows { x, y, .. } = &mut self.microbatches[microbatch];
        x.resize(tokens.len() * self.stage.config().hidden_size, 0.0);
        y.resize(x.len(), 0.0);
        Ok(self.stage.embed(tokens, x)?)
    }

    fn attend(
        &mut self,
        _mesh: &AttentionMesh,
        microbatch: usize,
        layer: usize,
        rows: &[Row],
    ) -> Result<(), DaemonError> {
        let Rows { x, y, experts, weights } = &mut self.microbatches[microbatch];
        self.stage.attention(layer, rows, x, &mut self.cache, y)?;
        let top_k = if self.stage.config().is_moe(layer) { self.stage.config().top_k } else { 0 };
        experts.resize(rows.len() * top_k, 0);
        weights.resize(rows.len() * top_k, 0.0);
        if top_k > 0 {
            self.stage.route(layer, y, experts, weights)?;
        }
        Ok(())
    }

    fn is_over(&mut self, _microbatch: usize) -> Result<bool, DaemonError> {
        Ok(true)
    }

    fn fill(&mut self, microbatch: usize, buffer: &mut SendBuffer) -> Result<(), DaemonError> {
        let Rows { y, experts, weights, .. } = &self.microbatches[microbatch];
        wire::encode(self.wire, y, self.stage.config().hidden_size, &mut self.scales, buffer)?;
        let part = self.wire.request_parts();
        for (bytes, id) in buffer.part_mut(part).as_chunks_mut::<2>().0.iter_mut().zip(experts) {
            *bytes = id.to_le_bytes();
        }
        for (bytes, weight) in buffer.part_mut(part + 1).as_chunks_mut::<4>().0.iter_mut().zip(weights) {
            *bytes = weight.to_le_bytes();
        }
        Ok(())
    }

    fn combine(
        &mut self,
        microbatch: usize,
        _rows: usize,
        replies: &Replies,
    ) -> Result<Result<(), String>, DaemonError> {
        let x = &mut self.microbatches[microbatch].x;
        self.partials.resize_with(replies.ranks(), Vec::new);
        for (rank, partial) in self.partials.iter_mut().enumerate() {
            partial.resize(x.len(), 0.0);
            if let Err(error) = self.wire.reply().decode(replies.part(rank, 0), partial) {
                return Ok(Err(format!("ffn {rank} replied with another shape: {error}")));
            }
        }
        let partials: Vec<&[f32]> = self.partials.iter().map(Vec::as_slice).collect();
        self.stage.combine(x, &partials)?;
        Ok(Ok(()))
    }

    fn begin_logits(&mut self, _microbatch: usize, _rows: Range<usize>) -> Result<(), DaemonError> {
        Ok(())
    }

    fn logits(&mut self, microbatch: usize, row: usize, logits: &mut [f32]) -> Result<(), DaemonError> {
        let hidden = self.stage.config().hidden_size;
        let state = &self.microbatches[microbatch].x[row * hidden..(row + 1) * hidden];
        Ok(self.stage.logits(state, logits)?)
    }
}
