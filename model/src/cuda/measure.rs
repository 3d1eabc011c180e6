//! What measurements need: operations by themselves, on noise.

use std::time::{Duration, Instant};

use half::bf16;
use stepmesh_transport::cuda::{Context, Span, Stream};

use super::cache::Batch;
use super::gpu::{CachePlace, Gpu, Grouping, Heads, Input};
use super::matrix::Matrix;
use super::memory::{Arena, PATIENCE, Staging};
use crate::cache::BLOCK_TOKENS;
use crate::fp8::{self, FP8_GROUP};
use crate::{Dtype, ModelError};

/// Weights that are noise, of about the size that keeps activations where they are.
pub(super) struct Noise<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) arena: &'a mut Arena,
    pub(super) staging: &'a Staging,
    pub(super) dtype: Dtype,
    pub(super) seed: u32,
}

impl Noise<'_> {
    pub(super) fn values(&mut self, elements: usize, scale: f32) -> Result<Span, ModelError> {
        let span = self.arena.take(elements * self.gpu.element())?;
        self.seed += 1;
        self.gpu.fill(&self.staging.stream(), &span, scale, self.seed)?;
        Ok(span)
    }

    pub(super) fn ones(&mut self, elements: usize) -> Result<Span, ModelError> {
        let span = self.arena.take(elements * 4)?;
        self.gpu.fill_f32(&self.staging.stream(), &span, 1.0)?;
        Ok(span)
    }

    /// `count` matrices `[n, k]` that are FP8 where the type has FP8 weights.
    pub(super) fn matrix(&mut self, n: usize, k: usize, count: usize) -> Result<Matrix, ModelError> {
        if !self.dtype.quantises() {
            let scale = (3.0 / k as f32).sqrt();
            let weights = (0..count).map(|_| self.values(n * k, scale)).collect::<Result<_, _>>()?;
            return Matrix::of(n, k, false, weights, Vec::new(), self.arena, self.staging);
        }
        let (mut weights, mut scales) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let codes = self.arena.take(n * k)?;
            self.seed += 1;
            self.gpu.fill_fp8(&self.staging.stream(), &codes, self.seed)?;
            let scale = self.arena.take(n * k.div_ceil(FP8_GROUP) * 4)?;
            self.gpu.fill_f32(&self.staging.stream(), &scale, (3.0 / k as f32).sqrt() / 100.0)?;
            weights.push(codes);
            scales.push(scale);
        }
        Matrix::of(n, k, true, weights, scales, self.arena, self.staging)
    }

    /// A matrix that is never FP8.
    pub(super) fn plain_matrix(&mut self, n: usize, k: usize) -> Result<Matrix, ModelError> {
        let weights = self.values(n * k, (3.0 / k as f32).sqrt())?;
        Matrix::of(n, k, false, vec![weights], Vec::new(), self.arena, self.staging)
    }
}

/// Runs work again and again on a stream: the median time of one, of `samples` measurements of `each`.
fn median(
    stream: &Stream,
    samples: usize,
    each: usize,
    mut work: impl FnMut() -> Result<(), ModelError>,
) -> Result<Duration, ModelError> {
    work()?;
    stream.finish(PATIENCE)?;
    let mut times = Vec::with_capacity(samples);
    for _ in 0..samples.max(1) {
        let started = Instant::now();
        for _ in 0..each.max(1) {
            work()?;
        }
        stream.finish(PATIENCE)?;
        times.push(started.elapsed() / each.max(1) as u32);
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

/// A product of bf16 matrices that keeps every multiprocessor busy.
pub struct GemmBench {
    gpu: Gpu,
    stream: Stream,
    matrix: Matrix,
    x: Span,
    out: Span,
    rows: usize,
}

impl GemmBench {
    /// `[rows, k]` times `[n, k]`^T, by cuBLASLt if `vendor` and if the machine has it, else by the kernel of our own.
    ///
    /// # Errors
    /// As loading a stage.
    pub fn new(index: u32, [rows, n, k]: [usize; 3], vendor: bool) -> Result<Self, ModelError> {
        let mut gpu = Gpu::open(&Context::open(index)?, true)?;
        if !vendor {
            gpu.forget_cublas();
        }
        let (mut arena, staging) = (Arena::new(&gpu.context), Staging::new(&gpu.context)?);
        let mut noise = Noise { gpu: &gpu, arena: &mut arena, staging: &staging, dtype: Dtype::Bf16, seed: 7 };
        let (matrix, x) = (noise.matrix(n, k, 1)?, noise.values(rows * k, 1.0)?);
        // What is there before must not be taken for a result: it differs.
        noise.seed += u32::from(vendor);
        let out = noise.values(rows * n, 1e6)?;
        staging.stream().finish(PATIENCE)?;
        let stream = Stream::new(&gpu.context)?;
        Ok(Self { gpu, stream, matrix, x, out, rows })
    }

    /// Whether cuBLASLt does it.
    pub fn has_cublas(&self) -> bool {
        self.gpu.has_cublas()
    }

    /// Floating-point operations of one.
    pub fn operations(&self) -> f64 {
        2.0 * self.rows as f64 * self.matrix.n as f64 * self.matrix.k as f64
    }

    /// Puts one on its stream.
    ///
    /// # Errors
    /// [`ModelError::Cuda`], [`ModelError::Library`].
    pub fn launch(&self) -> Result<(), ModelError> {
        let input = Input { plain: self.x.clone(), quantised: None };
        self.gpu.multiply(&self.stream, &self.matrix, &input, self.rows, &self.out, Grouping::One)
    }

    /// Waits for all that are on its stream.
    ///
    /// # Errors
    /// [`ModelError::Cuda`].
    pub fn finish(&self) -> Result<(), ModelError> {
        Ok(self.stream.finish(PATIENCE)?)
    }

    /// How far the results of two of the same shape are apart, as norms.
    ///
    /// # Errors
    /// As [`GemmBench::launch`].
    pub fn difference(&self, other: &Self) -> Result<f64, ModelError> {
        let (mut wrong, mut all) = (0.0, 0.0);
        let staging = Staging::new(&self.gpu.context)?;
        let mut results = Vec::new();
        for gemm in [self, other] {
            gemm.launch()?;
            gemm.finish()?;
            let mut values = vec![0.0; gemm.out.len() / 2];
            super::attention::read_values(&staging, true, &gemm.out, &mut values)?;
            results.push(values);
        }
        for (a, b) in results[0].iter().zip(&results[1]) {
            wrong += f64::from(a - b).powi(2);
            all += f64::from(*a).powi(2);
        }
        Ok((wrong / all).sqrt())
    }

    /// The median time of one.
    ///
    /// # Errors
    /// As [`GemmBench::launch`].
    pub fn time(&self, samples: usize, each: usize) -> Result<Duration, ModelError> {
        median(&self.stream, samples, each, || self.launch())
    }
}

/// A kernel of one thread that spins until it is told to end: what a wait without stream memory operations costs.
pub struct SpinBench {
    gpu: Gpu,
    stream: Stream,
    word: stepmesh_transport::Region,
}

impl SpinBench {
    /// Starts it.
    ///
    /// # Errors
    /// As loading a stage.
    pub fn start(index: u32) -> Result<Self, ModelError> {
        let gpu = Gpu::open(&Context::open(index)?, true)?;
        let host = stepmesh_transport::HostMemory::allocate(4096, None)?;
        let host = stepmesh_transport::Region::new(std::sync::Arc::new(host));
        let word = stepmesh_transport::cuda::PinnedMemory::pin(&gpu.context, host)?;
        let stream = Stream::new(&gpu.context)?;
        gpu.spin(&stream, &Span::new(&word, 0..8)?)?;
        Ok(Self { gpu, stream, word })
    }

    /// Ends it.
    ///
    /// # Errors
    /// [`ModelError::Cuda`].
    pub fn end(self) -> Result<(), ModelError> {
        self.word.write(0, &1_u64.to_le_bytes())?;
        self.stream.finish(PATIENCE)?;
        drop(self.gpu);
        Ok(())
    }
}

/// Decode attention alone: one row a sequence, every sequence with pages of its own.
pub struct AttendBench {
    gpu: Gpu,
    stream: Stream,
    staging: Staging,
    heads: Heads,
    pages: Span,
    is_fp8: bool,
    batch: Batch,
    positions: Vec<usize>,
    q: Span,
    out: Span,
    parts: Span,
    states: Span,
    _arena: Arena,
}

impl AttendBench {
    /// Rows at these positions, of `heads` heads of `dim` elements, on a bf16 or an FP8 cache; cut every `split` tokens.
    ///
    /// # Errors
    /// As loading a stage.
    pub fn new(
        index: u32,
        positions: &[usize],
        [heads, dim]: [usize; 2],
        is_fp8: bool,
        split: usize,
    ) -> Result<Self, ModelError> {
        let gpu = Gpu::open(&Context::open(index)?, true)?;
        let (mut arena, staging) = (Arena::new(&gpu.context), Staging::new(&gpu.context)?);
        let (rows, context) = (positions.len(), positions.iter().max().map_or(1, |most| most + 1));
        let pages_a_row = context.div_ceil(BLOCK_TOKENS);
        let elements = rows * pages_a_row * 2 * BLOCK_TOKENS * dim;
        let mut noise = Noise { gpu: &gpu, arena: &mut arena, staging: &staging, dtype: Dtype::Bf16, seed: 99 };
        let q = noise.values(rows * heads * dim, 2.0)?;
        let out = noise.values(rows * heads * dim, f32::MAX)?;
        let pages = match is_fp8 {
            false => noise.values(elements, 1.0)?,
            true => {
                let codes = arena.take(elements)?;
                gpu.fill_fp8(&staging.stream(), &codes, 5)?;
                codes
            }
        };
        let splits = context.div_ceil(split);
        let (parts, states) = (arena.take(rows * splits * heads * dim * 4)?, arena.take(rows * splits * heads * 8)?);
        let batch = Batch::new(&mut arena, rows, pages_a_row)?;
        // Pages of sequences lie among one another.
        let tables: Vec<Vec<u32>> =
            (0..rows).map(|row| (0..pages_a_row).map(|page| (page * rows + row) as u32).collect()).collect();
        batch.write(&staging, positions.iter().zip(&tables).map(|(position, table)| (*position, table.as_slice())))?;
        let (stream, positions) = (Stream::new(&gpu.context)?, positions.to_vec());
        let heads = Heads { count: heads, dim, split };
        Ok(Self { gpu, stream, staging, heads, pages, is_fp8, batch, positions, q, out, parts, states, _arena: arena })
    }

    /// Bytes of keys and values that are read.
    pub fn bytes(&self) -> usize {
        let tokens: usize = self.positions.iter().map(|position| position + 1).sum();
        tokens * 2 * self.heads.dim * if self.is_fp8 { 1 } else { 2 }
    }

    /// Puts one on its stream.
    ///
    /// # Errors
    /// [`ModelError::Cuda`].
    pub fn launch(&self) -> Result<(), ModelError> {
        let place = CachePlace { pages: &self.pages, first: 0, is_fp8: self.is_fp8 };
        let context = self.positions.iter().max().map_or(1, |most| most + 1);
        let parts = (&self.parts, &self.states);
        self.gpu.attend(&self.stream, &self.out, parts, &self.q, place, &self.batch.places, self.heads, context)
    }

    /// The median time of one.
    ///
    /// # Errors
    /// As [`AttendBench::launch`].
    pub fn time(&self, samples: usize, each: usize) -> Result<Duration, ModelError> {
        median(&self.stream, samples, each, || self.launch())
    }

    /// How far what it computes is from the same in 64 bits on the CPU: the norm of the difference over that of the result.
    ///
    /// # Errors
    /// As [`AttendBench::launch`].
    pub fn error(&self) -> Result<f64, ModelError> {
        self.launch()?;
        self.stream.finish(PATIENCE)?;
        let narrow = |bytes: Vec<u8>| -> Vec<f64> {
            let words = bytes.as_chunks::<2>().0.iter();
            words.map(|word| f64::from(bf16::from_bits(u16::from_le_bytes(*word)).to_f32())).collect()
        };
        let (q, out, pages) = (
            narrow(self.staging.download(&self.q)?),
            narrow(self.staging.download(&self.out)?),
            self.staging.download(&self.pages)?,
        );
        let pages: Vec<f64> = match self.is_fp8 {
            true => pages.into_iter().map(|code| f64::from(fp8::decode(code))).collect(),
            false => narrow(pages),
        };
        let Heads { count, dim, .. } = self.heads;
        let (rows, scale) = (self.positions.len(), 1.0 / (dim as f64).sqrt());
        let (mut wrong, mut all) = (0.0, 0.0);
        for (row, position) in self.positions.iter().enumerate() {
            let at = |token: usize, which: usize| {
                let page = token / BLOCK_TOKENS * rows + row;
                &pages[((page * 2 + which) * BLOCK_TOKENS + token % BLOCK_TOKENS) * dim..][..dim]
            };
            for head in 0..count {
                let place = (row * count + head) * dim;
                let query = &q[place..][..dim];
                let dot = |token| query.iter().zip(at(token, 0)).map(|(a, b)| a * b).sum::<f64>() * scale;
                let scores: Vec<f64> = (0..=*position).map(dot).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let mut exact = vec![0.0; dim];
                for (token, weight) in weights.iter().enumerate() {
                    exact.iter_mut().zip(at(token, 1)).for_each(|(exact, value)| *exact += weight / sum * value);
                }
                for (exact, found) in exact.iter().zip(&out[place..][..dim]) {
                    wrong += (exact - found) * (exact - found);
                    all += exact * exact;
                }
            }
        }
        Ok((wrong / all).sqrt())
    }
}
