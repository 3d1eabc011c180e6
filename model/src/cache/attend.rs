//! Causal attention over the pages of one sequence, in one pass: all heads read a page once, while it is in the cache of
//! the processor, and nothing is kept whose size is that of the context (Dao et al., FlashAttention, arXiv 2205.14135).

use super::{BLOCK_TOKENS, KvCache, Store};
use crate::kernel::{Isa, Scalar, Softmax, Values};
use crate::stage::Row;

/// Pages whose scores are kept at a time.
const PAGES: usize = 8;
const TOKENS: usize = PAGES * BLOCK_TOKENS;

/// The rotated query of one row whose key and value are in the cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query<'a> {
    pub(crate) layer: usize,
    pub(crate) row: Row,
    /// `[heads, head_dim]`.
    pub(crate) heads: &'a [f32],
}

/// Buffers kept between calls.
#[derive(Debug, Default)]
pub(crate) struct AttendScratch {
    /// `[heads, TOKENS]`.
    scores: Vec<f32>,
    /// `[heads]`.
    softmax: Vec<Softmax>,
}

impl KvCache {
    /// Attention of `query` over positions `0..=row.position` into `out` `[heads, head_dim]`, not rounded.
    ///
    /// Scores, their sum and the weighted values run in the order of positions, in groups that begin at multiples of 128:
    /// what a row gets depends on its own sequence alone.
    pub(crate) fn attend(&self, isa: Isa, query: Query<'_>, scratch: &mut AttendScratch, out: &mut [f32]) {
        match &self.values {
            Store::Host(Values::F32(stored)) => self.attend_in(stored, isa, query, scratch, out),
            Store::Host(Values::Bf16(stored)) => self.attend_in(stored, isa, query, scratch, out),
            Store::Device(_) => {}
        }
    }

    fn attend_in<S: Scalar>(
        &self,
        stored: &[S],
        isa: Isa,
        query: Query<'_>,
        scratch: &mut AttendScratch,
        out: &mut [f32],
    ) {
        let d = self.head_dim;
        let count = query.row.position + 1;
        let heads = query.heads.len() / d;
        let AttendScratch { scores, softmax } = scratch;
        scores.resize(heads * TOKENS, 0.0);
        softmax.clear();
        softmax.resize(heads, Softmax::NEW);
        out.fill(0.0);
        let scale = 1.0 / (d as f32).sqrt();
        let blocks = &self.sequences[query.row.sequence.index as usize].blocks;
        for (first, blocks) in (0..count).step_by(TOKENS).zip(blocks.chunks(PAGES)) {
            let tokens = TOKENS.min(count - first);
            let pages = || {
                blocks.iter().zip((0..tokens).step_by(BLOCK_TOKENS)).map(|(block, at)| {
                    let page = &stored[self.block_start(query.layer, *block)..][..2 * BLOCK_TOKENS * d];
                    let (keys, values) = page.split_at(BLOCK_TOKENS * d);
                    let held = BLOCK_TOKENS.min(tokens - at) * d;
                    (at, &keys[..held], &values[..held])
                })
            };
            for (at, keys, _) in pages() {
                isa.matmul(query.heads, keys, d, &mut scores[at..], TOKENS);
            }
            for ((scores, softmax), out) in
                scores.chunks_exact_mut(TOKENS).zip(softmax.iter_mut()).zip(out.chunks_exact_mut(d))
            {
                let before = softmax.go_on(&mut scores[..tokens], scale);
                out.iter_mut().for_each(|value| *value *= before);
                // What multiplies the values is rounded, the sum that divides it is not.
                self.dtype.round_all(&mut scores[..tokens]);
            }
            for (at, _, values) in pages() {
                isa.add_weighted(&scores[at..], TOKENS, values, d, out);
            }
        }
        for (out, softmax) in out.chunks_exact_mut(d).zip(softmax) {
            out.iter_mut().for_each(|value| *value /= softmax.sum);
        }
    }
}
