//! `stepmesh bench gpu`: what the runtime costs a GPU and what it takes on it. Everything here runs on a real driver; without one
//! it says so.
//!
//! | part | what |
//! |---|---|
//! | `numbers` | kernels against the CPU: attention in 64 bits, products against the vendor's, decoding against the CPU's stages |
//! | `zero-sm` | a product that keeps all multiprocessors busy, alone and while transfers run |
//! | `stream-in-place`, `stream-staged` | transfers alone, for whoever watches the GPU meanwhile |
//! | `pushpull` | round trips from stream to stream |
//! | `replay` | whole steps as graphs: 61 layers and three microbatches |
//! | `attention`, `ffn` | a layer of the released shape against the floor of the card |

mod kernels;
mod members;
mod numbers;
mod replay;
mod roundtrip;
mod streaming;

use crate::process::Program;
use crate::{BenchError, Report};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::str::FromStr;
use stepmesh_transport::cuda::Context;

pub use members::{GpuRole, play};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuPart {
    /// Kernels against the CPU.
    Numbers,
    /// A product alone and while transfers run.
    ZeroSm,
    /// Transfers alone, in place or by copy engines.
    Stream(bool),
    /// Round trips.
    PushPull,
    /// Whole steps.
    Replay,
    /// An attention layer.
    Attention,
    /// An FFN layer.
    Ffn,
}

impl GpuPart {
    /// What is measured unless somebody asks for less: all but the streams.
    pub const ALL: [Self; 6] = [Self::Numbers, Self::PushPull, Self::Replay, Self::Attention, Self::Ffn, Self::ZeroSm];
}

impl FromStr for GpuPart {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Ok(match name {
            "numbers" => Self::Numbers,
            "zero-sm" => Self::ZeroSm,
            "stream-in-place" => Self::Stream(false),
            "stream-staged" => Self::Stream(true),
            "pushpull" => Self::PushPull,
            "replay" => Self::Replay,
            "attention" => Self::Attention,
            "ffn" => Self::Ffn,
            _ => {
                return Err(format!(
                    "`{name}` is none of numbers, pushpull, replay, attention, ffn, zero-sm, stream-in-place, stream-staged"
                ));
            }
        })
    }
}

/// How it is measured.
#[derive(Clone, Debug)]
pub struct GpuOptions {
    /// The GPU, as the driver counts those that are visible.
    pub gpu: u32,
    /// What is measured, in this order.
    pub parts: Vec<GpuPart>,
    /// Of two processes: how the second is started. What is measured with two is left out without one.
    pub second: Option<Program>,
    /// Whether two processes share the GPU by MPS, which is for the results to say.
    pub is_mps: bool,
    /// A checkpoint whose linear layers are FP8, for `numbers`.
    pub fp8_checkpoint: Option<PathBuf>,
    /// A short look.
    pub quick: bool,
}

/// Measures; every result is told to `observe` as it comes.
///
/// # Errors
/// No GPU; what a part refuses. What was measured until then is in the report.
pub fn run(
    options: &GpuOptions,
    report: &mut Report<Value>,
    observe: &mut dyn FnMut(&Value) -> bool,
) -> Result<(), BenchError> {
    let context = Context::open(options.gpu)?;
    let mut tell = |value: Value| {
        report.results.push(value.clone());
        if observe(&value) { Ok(()) } else { Err(BenchError::Interrupted) }
    };
    let (free, total) = context.memory()?;
    let (major, minor) = context.capability()?;
    tell(json!({
        "part": "device", "device": context.name(), "capability": format!("{major}.{minor}"), "driver": context.driver_version(),
        "memory_bytes": total, "free_bytes": free, "dma_buf": context.exports_dma_buf(), "mps": options.is_mps,
    }))?;
    for part in &options.parts {
        match part {
            GpuPart::Numbers => numbers::run(options, &mut tell)?,
            GpuPart::ZeroSm => streaming::run(options, &mut tell)?,
            GpuPart::Stream(is_staged) => streaming::alone(options, *is_staged, &mut tell)?,
            GpuPart::PushPull => roundtrip::run(options, &mut tell)?,
            GpuPart::Replay => replay::run(options, &mut tell)?,
            GpuPart::Attention => kernels::attention(options, &mut tell)?,
            GpuPart::Ffn => kernels::ffn(options, &mut tell)?,
        }
    }
    Ok(())
}

/// Where results go.
type Tell<'a> = dyn FnMut(Value) -> Result<(), BenchError> + 'a;

/// The median of some figures.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match (figures.len() % 2, figures.as_slice()) {
        (_, []) => f64::NAN,
        (0, figures) => (figures[middle - 1] + figures[middle]) / 2.0,
        (_, figures) => figures[middle],
    }
}

/// A figure of which so many in a hundred are no larger.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(at.saturating_sub(1).min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_median_lies_in_the_middle() {
        assert_eq!(super::median(vec![3.0, 1.0]), 2.0);
        assert_eq!(super::median(vec![3.0, 1.0, 10.0]), 3.0);
        assert!(super::median(Vec::new()).is_nan());
    }
}
