//! A deployment that a command starts for itself: the few of its settings that change what the command shows.

use super::{DeploymentLayer, Precision, SlotMemory, Transport};
use std::num::{NonZeroU16, NonZeroU32};
use std::path::PathBuf;

/// What is asked of it; all else is as `up` has it by default.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct OwnDeployment {
    /// Directory with config.json and safetensors [default: the small checkpoint that the program carries]
    #[arg(long, value_name = "DIR")]
    pub(crate) checkpoint: Option<PathBuf>,
    /// Attention instances [default: 2]
    #[arg(long, value_name = "N")]
    attention: Option<NonZeroU32>,
    /// FFN instances [default: 2]
    #[arg(long, value_name = "N")]
    ffn: Option<NonZeroU32>,
    /// Microbatches in flight [default: 3]
    #[arg(long, value_name = "M")]
    microbatches: Option<NonZeroU16>,
    /// The data plane [default: shm]
    #[arg(long)]
    transport: Option<Transport>,
    /// What is computed in [default: f32]
    #[arg(long)]
    dtype: Option<Precision>,
    /// What rows travel as [default: what suits --dtype]
    #[arg(long)]
    wire: Option<Precision>,
    /// FFN instances that each routed expert is cut among; it divides their number [default: 1]
    #[arg(long, value_name = "N")]
    tensor_parallel: Option<NonZeroU32>,
    /// GPU that computes, for all daemons [default: the CPU does]
    #[arg(long, value_name = "INDEX")]
    gpu: Option<u32>,
    /// Where hidden states are on their way, if a GPU computes [default: gpu]
    #[arg(long)]
    slots: Option<SlotMemory>,
}

impl OwnDeployment {
    pub(crate) fn layer(&self) -> DeploymentLayer {
        DeploymentLayer {
            checkpoint: self.checkpoint.clone(),
            attention: self.attention,
            ffn: self.ffn,
            microbatches: self.microbatches,
            transport: self.transport,
            dtype: self.dtype,
            wire: self.wire,
            tensor_parallel: self.tensor_parallel,
            gpu: self.gpu,
            slots: self.slots,
            ..DeploymentLayer::default()
        }
    }
}
