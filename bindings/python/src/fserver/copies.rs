//! A GPU's tensors: its copy engines move them between where the program has them and the slots, which are host memory that
//! is pinned for it. A copy goes behind what is on the program's stream, and a gate says when it is over: no event, no kernel.

use crate::error::Failure;
use crate::streams::Streams;
use std::collections::HashMap;
use std::time::Duration;
use stepmesh_transport::cuda::{Context, CudaError, Gates, Stream};
use stepmesh_transport::{GateSet, Region, TransportError};

/// How long a mesh that is closed waits for copies that are under way.
const LAST_COPIES: Duration = Duration::from_secs(1);

/// Some bytes, from one address to another: between a tensor on the GPU and a slot.
pub(super) struct Piece {
    /// What the slot is of.
    pub(super) slot: Region,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) bytes: usize,
}

pub(super) struct Copies {
    gates: Gates,
    /// For tensors that are there already.
    own: Stream,
    streams: Streams,
    /// By gate: the slots of what has not been seen to be over.
    under_way: HashMap<usize, Vec<Region>>,
}

impl Copies {
    /// With so many gates, each for one group of copies at a time.
    pub(super) fn new(gpu: u32, gates: usize) -> Result<Self, Failure> {
        let new = || -> Result<Self, CudaError> {
            let context = Context::open(gpu)?;
            let (gates, own) = (Gates::new(&context, gates)?, Stream::new(&context)?);
            Ok(Self { gates, own, streams: Streams::new(context), under_way: HashMap::new() })
        };
        Ok(new().map_err(TransportError::from)?)
    }

    /// Copies the pieces behind what is on the program's stream, if one is given; the gate then says when.
    ///
    /// # Safety
    /// The pieces are as [`Stream::copy_between`] wants them, until the gate has said so; their slots are kept until then. The stream
    /// is one of this GPU.
    pub(super) unsafe fn start(&mut self, stream: Option<usize>, gate: usize, pieces: &[Piece]) -> Result<(), Failure> {
        let said = self.gates.gate(gate).ok_or_else(|| Failure::Invalid(format!("no gate {gate}")))?;
        self.under_way.insert(gate, pieces.iter().map(|piece| piece.slot.clone()).collect());
        let put = |stream: &Stream| {
            // SAFETY: by the contract.
            let copy = |piece: &Piece| unsafe { stream.copy_between(piece.from as u64, piece.to as u64, piece.bytes) };
            pieces.iter().try_for_each(copy)?;
            said.announce(stream)
        };
        let started = match stream {
            None => put(&self.own).map_err(|error| TransportError::from(error).into()),
            Some(handle) => self.streams.on(handle, put),
        };
        if started.is_err() {
            // Some may be on their way, and nobody will say when they are over.
            std::mem::forget(self.under_way.remove(&gate));
        }
        started
    }

    /// Whether anything has not been seen to be over.
    pub(super) fn are_under_way(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Whether what was started with a gate is over; says so once.
    pub(super) fn take(&mut self, gate: usize) -> bool {
        let over = self.gates.take(gate);
        if over {
            self.under_way.remove(&gate);
        }
        over
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        if self.under_way.is_empty() {
            return;
        }
        // The own stream has nothing before its copies; the program's may have work for ever, and its slots are never freed.
        let _ = self.own.finish(LAST_COPIES);
        std::mem::forget(std::mem::take(&mut self.under_way));
    }
}

/// What a wait does while copies are under way, in the place of sleeping until a peer rings: no event announces a gate, and a
/// sleep, however short, takes longer than a copy.
pub(super) fn rest() {
    std::thread::yield_now();
}
