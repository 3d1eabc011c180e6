//! What the mesh refuses, and what can befall it, in words that say which peer and what to do.

use crate::Peer;
use std::sync::Arc;
use std::time::Duration;
use stepmesh_transport::TransportError;
use thiserror::Error;

/// Every error of this crate's public calls.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MeshError {
    /// The slots cannot be laid out as asked.
    #[error("slot layout: {0}")]
    Layout(String),
    /// The transfer does not fit the layout.
    #[error("transfer: {0}")]
    Transfer(String),
    /// The slots would take more memory than the member allows itself.
    #[error(
        "the slots take {needed} bytes of registered memory ({layout}; {peers} peers), the limit is {limit}: \
         lower the batch, the microbatches or the number of peers, or raise the limit"
    )]
    Memory {
        /// Bytes that joining would register.
        needed: usize,
        /// Bytes allowed.
        limit: usize,
        /// The layout.
        layout: String,
        /// Peers on the other side.
        peers: usize,
    },
    /// The provider refused or failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The scheduler refused this member.
    #[error("the scheduler refused this member: {0}")]
    Refused(String),
    /// The control plane is gone.
    #[error("the scheduler is lost: {0}")]
    SchedulerLost(String),
    /// Not now: the microbatch's slot is still in use, by a buffer, a ticket, or a reply that is under way.
    #[error("microbatch {0} is in use: wait for its ticket first")]
    WouldBlock(u16),
    /// A microbatch that the layout does not have.
    #[error("microbatch {slot} of {microbatches}")]
    NoMicrobatch {
        /// As given.
        slot: u16,
        /// As laid out.
        microbatches: u16,
    },
    /// Not every FFN instance is linked (yet, or any more).
    #[error("not linked with {0}")]
    NotLinked(String),
    /// The deadline passed; what was waited for is still outstanding.
    #[error("nothing after {0:?}")]
    Timeout(Duration),
    /// The ticket was consumed or belongs to an earlier transfer.
    #[error("ticket {0} is not outstanding")]
    UnknownTicket(u64),
    /// The ticket will never complete.
    #[error("{0}")]
    Ticket(#[from] TicketFailure),
    /// The engine's progress thread met an error that it could not go on from.
    #[error("the progress thread has ended: {0}")]
    Ended(Arc<MeshError>),
    /// A bug of this crate or of a provider.
    #[error("it panicked; this is a bug, its message is on standard error")]
    Panicked,
}

/// Why a ticket failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TicketFailure {
    /// The link to a peer ended before its reply came.
    #[error("lost {peer}: {reason}")]
    PeerLost {
        /// The peer.
        peer: Peer,
        /// Why.
        reason: String,
    },
    /// The peer could not process the request.
    #[error("{peer} failed: {reason}")]
    PeerFailed {
        /// The peer.
        peer: Peer,
        /// What it said.
        reason: String,
    },
    /// The caller cancelled it.
    #[error("cancelled")]
    Cancelled,
}
