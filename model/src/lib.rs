//! Step-3's text model, cut where Attention-FFN disaggregation cuts it.
//!
//! A [`Checkpoint`] is opened once; an attention instance loads a [`CpuAttention`] from it, an FFN instance a [`CpuFfn`]
//! for its [`Shard`]. Both sit behind traits, [`AttentionStage`] and [`FfnStage`], that say how a layer is run. The
//! arithmetic is that of the Step-3 paper (arXiv 2507.19427) and of the released reference code, rounding points
//! included; every result is batch-invariant. The crate knows nothing of how rows travel between the sides, except
//! their bytes: [`WireDtype`].

mod cache;
mod checkpoint;
mod config;
mod cpu;
pub mod cuda;
mod dtype;
mod error;
mod fp8;
#[cfg(test)]
#[path = "../../fuzz/inputs.rs"]
mod fuzz_inputs;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod kernel;
mod linear;
mod load;
mod mlp;
#[doc(hidden)]
pub mod probe;
mod sampling;
mod shard;
mod size;
mod stage;
mod tensor;
mod text;
mod weights;
mod wire;

pub use cache::{BLOCK_TOKENS, CacheStats, KvCache, SequenceId};
pub use checkpoint::{Checkpoint, Inventory};
pub use config::ModelConfig;
pub use cpu::{CpuAttention, CpuFfn};
pub use dtype::Dtype;
pub use error::ModelError;
pub use fp8::{FP8_GROUP, fp8_groups, quantise_rows};
pub use linear::{Linear, LinearKind};
pub use load::{LoadOptions, LoadProgress};
pub use sampling::{Sampler, SamplingOptions, greedy, log_probability};
pub use shard::Shard;
pub use size::ParameterCount;
pub use stage::{AttentionStage, FfnInput, FfnStage, Hidden, Row};
pub use text::{ChatMessage, Detokenizer, Text};
pub use wire::WireDtype;
