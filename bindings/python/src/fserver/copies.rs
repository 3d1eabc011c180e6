//! A GPU's tensors: its copy engines move them between where the program has them and the slots, which are host memory that
//! is pinned for it. A copy goes behind what is on the program's stream, and a gate says when it is over: no event, no kernel.

use crate::error::Failure;
use crate::streams::Streams;
use stepmesh_transport::cuda::{Context, CudaError, Gates, Stream};
use stepmesh_transport::{GateSet, TransportError};

/// Some bytes, from one address to another, of which at least one is the GPU's.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) bytes: usize,
}

pub(super) struct Copies {
    gates: Gates,
    /// For tensors that are there already.
    own: Stream,
    streams: Streams,
}

impl Copies {
    /// With so many gates, each for one group of copies at a time.
    pub(super) fn new(gpu: u32, gates: usize) -> Result<Self, Failure> {
        let new = || -> Result<Self, CudaError> {
            let context = Context::open(gpu)?;
            let (gates, own) = (Gates::new(&context, gates)?, Stream::new(&context)?);
            Ok(Self { gates, own, streams: Streams::new(context) })
        };
        Ok(new().map_err(TransportError::from)?)
    }

    /// Copies the pieces behind what is on the program's stream, if one is given; the gate then says when.
    ///
    /// # Safety
    /// The pieces are as [`Stream::copy_between`] wants them, until the gate has said so; the stream is one of this GPU.
    pub(super) unsafe fn start(&self, stream: Option<usize>, gate: usize, pieces: &[Piece]) -> Result<(), Failure> {
        let gate = self.gates.gate(gate).ok_or_else(|| Failure::Invalid(format!("no gate {gate}")))?;
        let put = |stream: &Stream| {
            // SAFETY: by the contract.
            let copy = |piece: &Piece| unsafe { stream.copy_between(piece.from as u64, piece.to as u64, piece.bytes) };
            pieces.iter().try_for_each(copy)?;
            gate.announce(stream)
        };
        match stream {
            None => Ok(put(&self.own).map_err(TransportError::from)?),
            Some(handle) => self.streams.on(handle, put),
        }
    }

    /// Whether what was started with a gate is over; says so once.
    pub(super) fn take(&self, gate: usize) -> bool {
        self.gates.take(gate)
    }
}

/// What a wait does while copies are under way, in the place of sleeping until a peer rings: no event announces a gate, and a
/// sleep, however short, takes longer than a copy.
pub(super) fn rest() {
    std::thread::yield_now();
}
