//! Where an attention instance computes: between host slices, or on a GPU in the slots themselves.

use crate::DaemonError;
use std::ops::Range;
use stepmesh_mesh::{AttentionMesh, Replies, SendBuffer};
use stepmesh_model::{KvCache, ModelConfig, Row};

/// An attention stage with the rows of its microbatches. Of a microbatch one unit is computed at a time: it is begun by
/// [`attend`](Self::attend) or [`begin_logits`](Self::begin_logits), and over when [`is_over`](Self::is_over) says so.
pub(super) trait Compute: Send {
    /// The model's shape.
    fn config(&self) -> &ModelConfig;

    /// The cache that its sequences are in.
    fn cache(&mut self) -> &mut KvCache;

    /// Whether [`attend`](Self::attend) computes in the slot that is sent, which must be free then.
    fn fills_slots(&self) -> bool;

    /// Begins a step of these rows: looks their tokens up.
    fn begin(&mut self, microbatch: usize, tokens: &[u32], rows: &[Row]) -> Result<(), DaemonError>;

    /// Begins the attention half of a layer, and its router.
    fn attend(
        &mut self,
        mesh: &AttentionMesh,
        microbatch: usize,
        layer: usize,
        rows: &[Row],
    ) -> Result<(), DaemonError>;

    /// Whether nothing of this microbatch is being computed.
    fn is_over(&mut self, microbatch: usize) -> Result<bool, DaemonError>;

    /// Puts what was computed into the slot, unless it is there.
    fn fill(&mut self, microbatch: usize, buffer: &mut SendBuffer) -> Result<(), DaemonError>;

    /// Ends a layer of so many rows: adds the partial sums in rank order to the residual stream. The inner error is a peer's
    /// fault.
    fn combine(&mut self, microbatch: usize, rows: usize, replies: &Replies)
    -> Result<Result<(), String>, DaemonError>;

    /// Begins the logits of some of the rows, as they left the last layer.
    fn begin_logits(&mut self, microbatch: usize, rows: Range<usize>) -> Result<(), DaemonError>;

    /// The logits of one of those rows.
    fn logits(&mut self, microbatch: usize, row: usize, logits: &mut [f32]) -> Result<(), DaemonError>;
}
