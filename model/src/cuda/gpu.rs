//! A GPU as the stages use it: its kernels, the vendor's matrix products, and one call for each operation.
//!
//! Everything is put on a stream and done in its order; nothing here waits. Shapes are checked by the stages that call.

#![allow(clippy::too_many_arguments, reason = "what a kernel takes")]

use std::ffi::CStr;
use std::sync::Arc;

use stepmesh_transport::cuda::{Context, Span, Stream};

use super::cublas::CublasLt;
use super::matrix::Matrix;
use super::program::{Argument, Program, Shape, argument};
use crate::ModelError;
use crate::fp8::FP8_GROUP;

/// Partial results that are summed at once.
pub(super) const MOST_PARTIALS: usize = 64;

/// A GPU, ready to compute.
pub(super) struct Gpu {
    pub(super) context: Arc<Context>,
    program: Program,
    lt: Option<CublasLt>,
    /// Whether activations are bf16.
    pub(super) rounds: bool,
}

/// Which rows of a matrix product go to which weights.
#[derive(Clone, Copy)]
pub(super) enum Grouping<'a> {
    /// All to the only one.
    One,
    /// Sorted by expert: where each expert's end; with `order`, the row of `x` that each is.
    Experts { ends: &'a Span, order: Option<&'a Span>, average: usize },
}

/// Rows that are multiplied, as they are and, for FP8 weights, quantised.
#[derive(Clone)]
pub(super) struct Input {
    pub(super) plain: Span,
    pub(super) quantised: Option<(Span, Span)>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GemmArguments {
    x: u64,
    weights: u64,
    out: u64,
    x_scales: u64,
    weight_scales: u64,
    ends: u64,
    order: u64,
    rows: i32,
    groups: i32,
    n: i32,
    k: i32,
    scale_groups: i32,
}
impl Argument for GemmArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowsArgument {
    position: u64,
    table: u64,
    pages_a_row: i32,
    layer: u64,
}
impl Argument for RowsArgument {}

#[repr(C)]
#[derive(Clone, Copy)]
struct PartialsArgument([u64; MOST_PARTIALS]);
impl Argument for PartialsArgument {}

/// The rows of a batch on the device: their positions and their sequences' pages.
#[derive(Clone)]
pub(super) struct RowPlaces {
    /// `[rows]`, 32-bit.
    pub(super) positions: Span,
    /// `[rows, pages_a_row]`, 32-bit.
    pub(super) tables: Span,
    pub(super) pages_a_row: usize,
}

/// A layer's part of a cache on the device.
#[derive(Clone, Copy)]
pub(super) struct CachePlace<'a> {
    pub(super) pages: &'a Span,
    /// Where the layer begins, in pages.
    pub(super) first: usize,
    pub(super) is_fp8: bool,
}

/// How attention is cut.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) count: usize,
    pub(super) dim: usize,
    /// Tokens of a part.
    pub(super) split: usize,
}

macro_rules! launch {
    ($gpu:expr, $stream:expr, $name:literal, $grid:expr, $block:expr, $shared:expr; $($value:expr),* $(,)?) => {{
        let shape = Shape { grid: $grid, block: $block, shared: $shared };
        // SAFETY: the arguments are those that the kernel's declaration in `kernels/` lists, in its order and of its kinds; what
        // they point to are spans that `launch_held` has put in the stream's keeping.
        unsafe { $gpu.program.launch($stream, $name, shape, &mut [$(argument(&$value)),*]) }
    }};
}

impl Gpu {
    pub(super) fn open(context: &Arc<Context>, rounds: bool) -> Result<Self, ModelError> {
        let program = Program::load(context, rounds)?;
        let lt = if rounds { CublasLt::load(context)? } else { None };
        Ok(Self { context: context.clone(), program, lt, rounds })
    }

    /// Whether the vendor's library multiplies.
    pub(super) fn has_cublas(&self) -> bool {
        self.lt.is_some()
    }

    /// Multiplies by kernels of our own from now on.
    pub(super) fn forget_cublas(&mut self) {
        self.lt = None;
    }

    /// Bytes of an activation.
    pub(super) fn element(&self) -> usize {
        if self.rounds { 2 } else { 4 }
    }

    /// Keeps what kernels will touch until the stream has done it.
    fn keep(&self, stream: &Stream, spans: &[&Span]) {
        stream.hold(spans.iter().map(|span| span.region().memory().clone()));
    }

    pub(super) fn embed(
        &self,
        stream: &Stream,
        x: &Span,
        (table, narrow): (&Span, bool),
        tokens: &Span,
        width: usize,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[x, table, tokens]);
        let rows = tokens.len() / 4;
        let (x, table, tokens, width) = (x.address(), table.address(), tokens.address(), width as i32);
        match narrow {
            true => launch!(self, stream, c"embed_bf16", [rows, 1, 1], 256, 0; x, table, tokens, width),
            false => launch!(self, stream, c"embed_f32", [rows, 1, 1], 256, 0; x, table, tokens, width),
        }
    }

    /// `stride` is that of `x`, in elements.
    pub(super) fn rms_norm(
        &self,
        stream: &Stream,
        out: &Span,
        x: &Span,
        stride: usize,
        weight: &Span,
        rows: usize,
        eps: f32,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[out, x, weight]);
        let (out, x, stride, width) = (out.address(), x.address(), stride as u32, (weight.len() / 4) as i32);
        let weight = weight.address();
        launch!(self, stream, c"rms_norm", [rows, 1, 1], 256, 0; out, x, stride, weight, width, eps)
    }

    pub(super) fn add_rms_norm(
        &self,
        stream: &Stream,
        out: &Span,
        x: &Span,
        added: &Span,
        weight: &Span,
        rows: usize,
        eps: f32,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[out, x, added, weight]);
        let width = (weight.len() / 4) as i32;
        let (out, x, added, weight) = (out.address(), x.address(), added.address(), weight.address());
        launch!(self, stream, c"add_rms_norm", [rows, 1, 1], 256, 0; out, x, added, weight, width, eps)
    }

    pub(super) fn silu_times(
        &self,
        stream: &Stream,
        out: &Span,
        both: &Span,
        width: usize,
        rows: usize,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[out, both]);
        let elements = (rows * width) as u64;
        let (out, both, width) = (out.address(), both.address(), width as i32);
        launch!(self, stream, c"silu_times", [blocks(elements), 1, 1], 256, 0; out, both, width, elements)
    }

    /// `narrow` if the partial results are bf16, f32 otherwise.
    pub(super) fn combine(
        &self,
        stream: &Stream,
        x: &Span,
        partials: &[Span],
        narrow: bool,
        elements: usize,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[x]);
        self.keep(stream, &partials.iter().collect::<Vec<_>>());
        let mut of = PartialsArgument([0; MOST_PARTIALS]);
        of.0.iter_mut().zip(partials).for_each(|(of, partial)| *of = partial.address());
        let (x, count, elements) = (x.address(), partials.len() as i32, elements as u64);
        let grid = [blocks(elements), 1, 1];
        match narrow {
            true => launch!(self, stream, c"combine_bf16", grid, 256, 0; x, of, count, elements),
            false => launch!(self, stream, c"combine_f32", grid, 256, 0; x, of, count, elements),
        }
    }

    pub(super) fn quantise(
        &self,
        stream: &Stream,
        codes: &Span,
        scales: &Span,
        x: &Span,
        width: usize,
        rows: usize,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[codes, scales, x]);
        let groups = width.div_ceil(FP8_GROUP);
        let all = (rows * groups) as u64;
        let (codes, scales, x, width, groups) =
            (codes.address(), scales.address(), x.address(), width as i32, groups as i32);
        let grid = [all.div_ceil(8) as usize, 1, 1];
        launch!(self, stream, c"quantise", grid, 256, 0; codes, scales, x, width, groups, all)
    }

    pub(super) fn dequantise(
        &self,
        stream: &Stream,
        out: &Span,
        codes: &Span,
        scales: &Span,
        width: usize,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[out, codes, scales]);
        let (elements, groups) = (codes.len() as u64, width.div_ceil(FP8_GROUP) as i32);
        let (out, codes, scales, width) = (out.address(), codes.address(), scales.address(), width as i32);
        launch!(self, stream, c"dequantise", [blocks(elements), 1, 1], 256, 0; out, codes, scales, width, groups, elements)
    }

    /// `out` `[rows, n]` = `x` `[rows, k]` times the weights' transpose.
    pub(super) fn multiply(
        &self,
        stream: &Stream,
        matrix: &Matrix,
        x: &Input,
        rows: usize,
        out: &Span,
        grouping: Grouping<'_>,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[&x.plain, out, &matrix.places]);
        matrix.weights.iter().chain(&matrix.scales).for_each(|span| self.keep(stream, &[span]));
        if rows == 0 || matrix.n == 0 {
            return Ok(());
        }
        if let (Some(lt), Grouping::One, false, [weights]) =
            (&self.lt, grouping, matrix.is_fp8, matrix.weights.as_slice())
            && matrix.n.is_multiple_of(8)
        {
            let shape = [rows, matrix.n, matrix.k];
            return lt.multiply(stream, x.plain.address(), weights.address(), out.address(), shape);
        }
        let (ends, order, average) = match grouping {
            Grouping::One => (0, 0, rows),
            Grouping::Experts { ends, order, average } => {
                self.keep(stream, &[ends]);
                order.into_iter().for_each(|order| self.keep(stream, &[order]));
                (ends.address(), order.map_or(0, Span::address), average)
            }
        };
        let (mut from, mut x_scales) = (x.plain.address(), 0);
        if matrix.is_fp8 {
            let Some((codes, scales)) = &x.quantised else {
                return Err(ModelError::Unsupported { reason: "FP8 weights with rows that are not quantised".into() });
            };
            self.keep(stream, &[codes, scales]);
            (from, x_scales) = (codes.address(), scales.address());
        }
        let count = matrix.weights.len();
        let gemm = GemmArguments {
            x: from,
            weights: matrix.places.address(),
            out: out.address(),
            x_scales,
            weight_scales: matrix.places.address() + 8 * count as u64,
            ends,
            order,
            rows: rows as i32,
            groups: count as i32,
            n: matrix.n as i32,
            k: matrix.k as i32,
            scale_groups: matrix.groups() as i32,
        };
        let (name, tile, wide, threads): (&'static CStr, usize, usize, u32) =
            match (self.rounds, matrix.is_fp8, average) {
                (false, ..) => (c"gemm_f32", 64, 64, 256),
                (true, false, ..=16) => (c"gemm_bf16_16", 16, 128, 128),
                (true, false, ..=64) => (c"gemm_bf16_64", 64, 128, 256),
                (true, false, _) => (c"gemm_bf16_128", 128, 256, 256),
                (true, true, ..=16) => (c"gemm_fp8_16", 16, 128, 128),
                (true, true, ..=64) => (c"gemm_fp8_64", 64, 128, 256),
                (true, true, _) => (c"gemm_fp8_128", 128, 128, 256),
            };
        let tiles = rows.div_ceil(tile) + if ends == 0 { 0 } else { count };
        let shape = Shape { grid: [matrix.n.div_ceil(wide), tiles, 1], block: threads, shared: 0 };
        // SAFETY: every such kernel takes this one structure; what it points to was put in the stream's keeping above.
        unsafe { self.program.launch(stream, name, shape, &mut [argument(&gemm)]) }
    }

    pub(super) fn rotate_and_store(
        &self,
        stream: &Stream,
        q: &Span,
        (kv, stride, key_at): (&Span, usize, usize),
        cache: CachePlace<'_>,
        rows: &RowPlaces,
        frequencies: &Span,
        heads: Heads,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[q, kv, cache.pages, &rows.positions, &rows.tables, frequencies]);
        let count = rows.positions.len() / 4;
        let (q, kv, pages, places) =
            (q.address(), kv.address(), cache.pages.address(), rows_argument(rows, cache.first));
        let (stride, key_at, frequencies) = (stride as u32, key_at as u32, frequencies.address());
        let (shared, heads, dim) = (heads.dim * 4, heads.count as i32, heads.dim as i32);
        launch!(self, stream, c"rotate_and_store", [count, 1, 1], 256, shared; q, kv, stride, key_at, pages, places, frequencies, heads, dim)
    }

    /// Attention of rows of up to `context` tokens. `parts` and `states` have room for all parts.
    pub(super) fn attend(
        &self,
        stream: &Stream,
        out: &Span,
        (parts, states): (&Span, &Span),
        q: &Span,
        cache: CachePlace<'_>,
        rows: &RowPlaces,
        heads: Heads,
        context: usize,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[out, parts, states, q, cache.pages, &rows.positions, &rows.tables]);
        let (count, splits) = (rows.positions.len() / 4, context.div_ceil(heads.split).max(1));
        let is_released = self.rounds && heads.dim == 256 && heads.count.is_multiple_of(64);
        if cache.is_fp8 && !is_released {
            return Err(ModelError::Unsupported {
                reason: "an FP8 cache for other than 64 heads of 256 elements".into(),
            });
        }
        let (out, q, pages, places) =
            (out.address(), q.address(), cache.pages.address(), rows_argument(rows, cache.first));
        let (parts, states, scale) = (parts.address(), states.address(), 1.0 / (heads.dim as f32).sqrt());
        let (split, most, h, d) = (heads.split as i32, splits as i32, heads.count as i32, heads.dim as i32);
        match (is_released, cache.is_fp8) {
            (true, false) => {
                launch!(self, stream, c"attend_bf16", [splits, count, heads.count / 64], 128, 0; out, parts, states, q, pages, places, h, split, most, scale)?
            }
            (true, true) => {
                launch!(self, stream, c"attend_fp8", [splits, count, heads.count / 64], 128, 0; out, parts, states, q, pages, places, h, split, most, scale)?
            }
            _ => {
                launch!(self, stream, c"attend", [splits, count, heads.count], 128, (2 * heads.dim + 128) * 4; out, parts, states, q, pages, places, h, d, split, most, scale)?
            }
        }
        if splits > 1 {
            launch!(self, stream, c"join", [count, heads.count, 1], 128, 0; out, parts, states, places, h, d, split, most)?;
        }
        Ok(())
    }

    pub(super) fn choose(
        &self,
        stream: &Stream,
        ids: &Span,
        weights: &Span,
        scores: &Span,
        [rows, experts, top_k]: [usize; 3],
        normalises: bool,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[ids, weights, scores]);
        let (ids, weights, scores) = (ids.address(), weights.address(), scores.address());
        let (count, all, k, normalises) = (rows as i32, experts as i32, top_k as i32, i32::from(normalises));
        let grid = [rows.div_ceil(4), 1, 1];
        launch!(self, stream, c"choose", grid, 128, 4 * experts * 4; ids, weights, scores, count, all, k, normalises)
    }

    pub(super) fn sort_visits(
        &self,
        stream: &Stream,
        ends: &Span,
        order: &Span,
        place: &Span,
        ids: &Span,
        [rows, top_k]: [usize; 2],
        held: std::ops::Range<usize>,
    ) -> Result<(), ModelError> {
        self.keep(stream, &[ends, order, place, ids]);
        let (ends, order, place, ids) = (ends.address(), order.address(), place.address(), ids.address());
        let (rows, k, first, count) = (rows as i32, top_k as i32, held.start as i32, held.len() as i32);
        launch!(self, stream, c"sort_visits", [1, 1, 1], 1024, held.len() * 4; ends, order, place, ids, rows, k, first, count)
    }

    pub(super) fn gather_results(
        &self,
        stream: &Stream,
        out: &Span,
        results: &Span,
        shared: &Span,
        (ids, weights, place): (&Span, &Span, &Span),
        [rows, top_k, width]: [usize; 3],
    ) -> Result<(), ModelError> {
        self.keep(stream, &[out, results, shared, ids, weights, place]);
        let (out, results, shared) = (out.address(), results.address(), shared.address());
        let (ids, weights, place) = (ids.address(), weights.address(), place.address());
        let (k, width) = (top_k as i32, width as i32);
        launch!(self, stream, c"gather_results", [rows, 1, 1], 256, 0; out, results, shared, ids, weights, place, k, width)
    }

    /// One thread that waits until a word of pinned memory is not zero.
    pub(super) fn spin(&self, stream: &Stream, word: &Span) -> Result<(), ModelError> {
        self.keep(stream, &[word]);
        let word = word.address();
        launch!(self, stream, c"spin", [1, 1, 1], 1, 0; word)
    }

    /// Values even in `-scale..scale`, for measurements.
    pub(super) fn fill(&self, stream: &Stream, x: &Span, scale: f32, seed: u32) -> Result<(), ModelError> {
        self.keep(stream, &[x]);
        let (elements, x) = ((x.len() / self.element()) as u64, x.address());
        launch!(self, stream, c"fill", [blocks(elements), 1, 1], 256, 0; x, elements, scale, seed)
    }

    /// FP8 codes, likewise.
    pub(super) fn fill_fp8(&self, stream: &Stream, codes: &Span, seed: u32) -> Result<(), ModelError> {
        self.keep(stream, &[codes]);
        let (elements, codes) = (codes.len() as u64, codes.address());
        launch!(self, stream, c"fill_fp8", [blocks(elements), 1, 1], 256, 0; codes, elements, seed)
    }

    pub(super) fn fill_f32(&self, stream: &Stream, x: &Span, value: f32) -> Result<(), ModelError> {
        self.keep(stream, &[x]);
        let (elements, x) = ((x.len() / 4) as u64, x.address());
        launch!(self, stream, c"fill_f32", [blocks(elements), 1, 1], 256, 0; x, elements, value)
    }
}

fn rows_argument(rows: &RowPlaces, layer: usize) -> RowsArgument {
    let (position, table, pages_a_row) = (rows.positions.address(), rows.tables.address(), rows.pages_a_row as i32);
    RowsArgument { position, table, pages_a_row, layer: layer as u64 }
}

/// Blocks of 256 threads that go over so many elements.
fn blocks(elements: u64) -> usize {
    elements.div_ceil(256).min(4096) as usize
}
