//! Step-3's stages as clients of the mesh: the three-stage ping-pong pipeline (attention | wire | FFN).
//!
//! With `M` microbatches in flight an attention instance computes one while the others are on the wire or in the FFN
//! instances. [`AttentionExecutor`] and [`FfnExecutor`] are state machines that do one unit of work a call, so that
//! the daemons, and the simulation on a virtual clock, drive the same code.

mod attention;
mod daemon;
mod error;
mod ffn;
mod figures;
mod gpu;
mod layout;
mod microbatch;
mod options;
mod schedule;
mod sequence;
mod wire;

pub use attention::{AttentionExecutor, AttentionSide};
pub use daemon::{run_attention, run_ffn};
pub use error::DaemonError;
pub use ffn::{FfnExecutor, FfnSide};
pub use layout::{StageTag, slot_layout, workload};
pub use options::{AttentionOptions, CheckpointSource, DaemonOptions, FfnOptions, Notice, Shutdown, Slots};
pub use schedule::{Bound, Overhead, Stages};
pub use wire::Wire;

/// What a call of an executor did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A unit of work; there may be more at once.
    Worked,
    /// Nothing: work is under way elsewhere.
    Stalled,
    /// Nothing: there is no work at all.
    Idle,
}
