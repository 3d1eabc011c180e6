//! Where an FFN instance computes: between host slices, or on a GPU in the slots themselves.

use crate::DaemonError;
use crate::layout::{HIDDEN, StageTag};
use crate::wire::Wire;
use stepmesh_mesh::{Batch, MeshError, Segment};
use stepmesh_model::ModelConfig;
use stepmesh_proto::Part;

/// An FFN stage with the batches that it works on.
pub(super) trait Compute: Send {
    /// Whether another batch can be begun.
    fn has_room(&self) -> bool;

    /// Begins a batch. A segment that is not what the layer takes is refused, alone.
    fn begin(&mut self, batch: Batch) -> Result<(), DaemonError>;

    /// A batch whose replies are in their slots.
    fn end(&mut self) -> Result<Option<Batch>, DaemonError>;

    /// Whether a batch is being computed, of whose end nothing tells but [`end`](Self::end).
    fn is_busy(&self) -> bool;
}

/// Says what a segment's reply is.
pub(super) fn say(segment: &mut Segment, wire: Wire, rows: usize, hidden: usize) -> Result<(), MeshError> {
    segment.set_reply(&[Part {
        key: HIDDEN,
        dtype: wire.reply_dtype(),
        rows: rows as u32,
        row_bytes: wire.reply().row_bytes(hidden) as u32,
        offset: 0,
    }])
}

/// Whether the layer exists, and a segment's parts have the shapes and types that it takes.
pub(super) fn is_request(segment: &Segment, layer: usize, config: &ModelConfig, wire: Wire) -> bool {
    use stepmesh_proto::Dtype;
    if layer >= config.num_layers {
        return false;
    }
    let top_k = if config.is_moe(layer) { config.top_k } else { 0 };
    let parts = segment.parts();
    let rows = segment.rows() as u32;
    let is = |index: usize, dtype: Dtype, row_bytes: usize| {
        parts
            .get(index)
            .is_some_and(|part| part.rows == rows && part.dtype == dtype && part.row_bytes as usize == row_bytes)
    };
    let experts = wire.request_parts();
    let kinds = [wire.request_dtype(), Dtype::F32];
    StageTag::decode(segment.app()).layer as usize == layer
        && wire
            .request_row_bytes(config.hidden_size)
            .zip(kinds)
            .enumerate()
            .all(|(i, (bytes, dtype))| is(i, dtype, bytes))
        && (top_k == 0 || (is(experts, Dtype::U16, top_k * 2) && is(experts + 1, Dtype::F32, top_k * 4)))
}
