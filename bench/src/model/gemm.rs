//! One matrix product, over and over, between two looks at the processor's peak.

use super::row::{Floor, Gemm};
use super::{Options, median};
use crate::floor::fma_peak;
use crate::{BenchError, Drift};
use std::time::{Duration, Instant};
use stepmesh_model::{Linear, LinearKind};

/// How long the peak is looked at, before and after.
const PEAK_TIME: Duration = Duration::from_millis(300);
/// Scale of FP8 weights.
const SCALE: f32 = 1.0 / 448.0;

pub(super) fn take(
    options: &Options,
    &(layer, rows, cols): &(&'static str, usize, usize),
    kind: LinearKind,
    attempt: usize,
) -> Result<Gemm, BenchError> {
    let mut linear = Linear::new(rows, cols, kind, options.threads, SCALE, |row, col| noise(row * cols + col))?;
    let x: Vec<f32> = (0..options.tokens * cols).map(noise).collect();
    let mut out = vec![0.0; options.tokens * rows];
    linear.apply(&x, &mut out)?;
    let peak_time = PEAK_TIME.min(options.time);
    let before = fma_peak(options.threads, peak_time)? / 1e9;
    let operations = 2.0 * (options.tokens * rows * cols) as f64;
    let (started, mut rates) = (Instant::now(), Vec::new());
    while rates.is_empty() || started.elapsed() < options.time {
        let begun = Instant::now();
        linear.apply(&x, &mut out)?;
        rates.push(operations / begun.elapsed().as_secs_f64() / 1e9);
    }
    let after = fma_peak(options.threads, peak_time)? / 1e9;
    let (gflops, floor) = (median(&mut rates), f64::midpoint(before, after));
    Ok(Gemm {
        op: "gemm",
        layer,
        weights: kind.name(),
        tokens: options.tokens,
        rows,
        cols,
        threads: options.threads,
        gflops,
        floor: Floor { name: "fused multiply-add on registers", gflops: floor },
        ratio: gflops / floor,
        drift: Drift::new(before, after, attempt),
    })
}

/// Numbers from -1 to 1 without a pattern that arithmetic could profit from.
fn noise(index: usize) -> f32 {
    let mixed = (index as u32 ^ 0x9e37_79b9).wrapping_mul(0x85eb_ca6b);
    ((mixed ^ (mixed >> 13)).wrapping_mul(0xc2b2_ae35) >> 8) as f32 / (1 << 23) as f32 - 1.0
}
