//! One of the batches in flight: its sequences, where it stands in its step, its rows.

use crate::sequence::Sequence;
use stepmesh_mesh::Ticket;
use stepmesh_model::Row;

/// Where a microbatch stands in its step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// No step; the FFN instances do not wait for this microbatch.
    Idle,
    /// No step, but the FFN instances have yet to be told.
    Leave,
    /// The attention half of the layer is to be computed.
    Compute { layer: usize },
    /// The attention half of the layer is being computed; behind the last one, what the next tokens follow from.
    Computing { layer: usize },
    /// Computed; the request is to be sent, again if it was lost on the way.
    Push { layer: usize },
    /// The FFN instances have it.
    Wait { layer: usize, ticket: Ticket },
}

pub(crate) struct Microbatch {
    pub(crate) phase: Phase,
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) joining: Vec<Sequence>,
    pub(crate) step: u64,
    pub(crate) rows: Vec<Row>,
    /// Rows of each sequence in this step.
    pub(crate) counts: Vec<usize>,
}

impl Microbatch {
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::Idle,
            sequences: Vec::new(),
            joining: Vec::new(),
            step: 0,
            rows: Vec::new(),
            counts: Vec::new(),
        }
    }

    /// Sequences that it carries or will carry.
    pub(crate) fn load(&self) -> usize {
        self.sequences.len() + self.joining.len()
    }
}
