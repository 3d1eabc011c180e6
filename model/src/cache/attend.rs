//! Causal attention over the pages of one sequence.

use super::{BLOCK_TOKENS, KvCache};
use crate::kernel::{Isa, Scalar, Values, exp_sum};
use crate::stage::Row;

/// The rotated query of one row whose key and value are in the cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query<'a> {
    pub(crate) layer: usize,
    pub(crate) row: Row,
    /// `[heads, head_dim]`.
    pub(crate) heads: &'a [f32],
}

impl KvCache {
    /// Attention of `query` over positions `0..=row.position` into `out` `[heads, head_dim]`, not rounded.
    /// `scores` is scratch of at least `[heads, row.position + 1]`.
    ///
    /// Scores, their sum and the weighted values run in the order of positions, so that pages leave no trace.
    pub(crate) fn attend(&self, isa: Isa, query: Query<'_>, scores: &mut [f32], out: &mut [f32]) {
        match &self.values {
            Values::F32(stored) => self.attend_in(stored, isa, query, scores, out),
            Values::Bf16(stored) => self.attend_in(stored, isa, query, scores, out),
        }
    }

    fn attend_in<S: Scalar>(&self, stored: &[S], isa: Isa, query: Query<'_>, scores: &mut [f32], out: &mut [f32]) {
        let d = self.head_dim;
        let tokens = query.row.position + 1;
        let blocks = &self.sequences[query.row.sequence.index as usize].blocks;
        let pages = || {
            blocks.iter().zip((0..tokens).step_by(BLOCK_TOKENS)).map(|(block, first)| {
                let page = &stored[self.block_start(query.layer, *block)..][..2 * BLOCK_TOKENS * d];
                let (keys, values) = page.split_at(BLOCK_TOKENS * d);
                let held = BLOCK_TOKENS.min(tokens - first) * d;
                (first, &keys[..held], &values[..held])
            })
        };
        for (first, keys, _) in pages() {
            isa.matmul(query.heads, keys, d, &mut scores[first..], tokens);
        }
        let scale = 1.0 / (d as f32).sqrt();
        for scores in scores.chunks_exact_mut(tokens).take(query.heads.len() / d) {
            let sum = exp_sum(scores, scale);
            // As flash-attention kernels do: what multiplies the values is rounded, the sum that divides it is not.
            scores.iter_mut().for_each(|p| *p = self.dtype.round(*p) / sum);
        }
        out.fill(0.0);
        for (first, _, values) in pages() {
            isa.add_weighted(&scores[first..], tokens, values, d, out);
        }
    }
}
