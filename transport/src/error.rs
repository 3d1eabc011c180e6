//! What can go wrong below the mesh, in words that say what to do.

use crate::{LinkId, Provider};
use std::io;
use thiserror::Error;

/// A call was refused or failed; nothing was changed by it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The system refused a resource or a call.
    #[error("{what}: {source}")]
    System {
        /// What was being done, with the name of the thing.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// This provider or machine cannot do it.
    #[error("{what} is not supported: {hint}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do instead.
        hint: String,
    },
    /// An argument is out of its range.
    #[error("{what}")]
    Invalid {
        /// Names the argument, its value and its range.
        what: String,
    },
    /// A network device does not take memory.
    #[error("{device} does not register {bytes} bytes of {memory}: {source}; {hint}")]
    Registration {
        /// The network device.
        device: String,
        /// How many.
        bytes: usize,
        /// What kind of memory, and how it was to be reached.
        memory: String,
        /// The system's reason.
        source: io::Error,
        /// What to do.
        hint: String,
    },
    /// The bytes are a device's.
    #[error(
        "the CPU may not touch device memory: copy the bytes with the calls of the device that they are on, or send them by \
         `verbs`"
    )]
    DeviceMemory,
    /// A GPU refused or failed.
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
    /// The link is closed or was never opened.
    #[error("link {0:?} is not open")]
    NoLink(LinkId),
    /// A descriptor did not come from a peer of the same provider, or is damaged.
    #[error("not a {provider} descriptor: {what}")]
    Descriptor {
        /// The provider that was to read it.
        provider: Provider,
        /// What is wrong with it.
        what: String,
    },
    /// The place in the address space is still in use by an older mapping.
    #[error("the place at offset {offset} is still mapped: drop what refers to the earlier region first")]
    PlaceTaken {
        /// Bytes from the start of the address space.
        offset: usize,
    },
}

impl TransportError {
    /// A system error with its context.
    pub fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }

    /// An argument that is out of range.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }
}

/// Why a chain was not posted; nothing of it was.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PostError {
    /// The lane's queue is full: poll, then post again.
    #[error("the lane's queue is full")]
    WouldBlock,
    /// The link is not connected (not yet, or no longer).
    #[error("link {0:?} is not connected")]
    NotConnected(LinkId),
    /// The request names a lane, a local range or an operation that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// This provider or device does not do it, however it is asked; [`crate::Properties`] says so beforehand.
    #[error("{provider} does no {what}")]
    Unsupported {
        /// The provider.
        provider: Provider,
        /// What was asked for.
        what: &'static str,
    },
}
