//! Errors as Python's exceptions, which `stepmesh/errors.py` defines.

use pyo3::prelude::*;
use pyo3::types::PyType;
use stepmesh_embed::{JoinError, ListError};
use stepmesh_mesh::control::ControlError;
use stepmesh_mesh::{MeshError, TicketFailure};
use stepmesh_transport::TransportError;
use stepmesh_transport::cuda::CudaError;

/// Everything that a call can fail with.
#[derive(Debug)]
pub(crate) enum Failure {
    /// An argument, which the words name.
    Invalid(String),
    /// An argument's type, which the words name.
    Type(String),
    /// What a ticket or handler of another transfer, or an earlier one, is asked for.
    Unknown(String),
    /// The mesh was closed, is being closed, or the interpreter ends.
    Closed(String),
    /// The mesh belongs to the process that this one was forked from.
    Forked,
    /// Device memory where that cannot be, or none where it is wanted.
    Device(String),
    /// A peer is lost.
    Lost(String),
    /// A peer could not do it.
    Peer(String),
    /// The time is over.
    Timeout(String),
    /// The mesh's own.
    Mesh(MeshError),
    /// The control plane's.
    Control(ControlError),
    /// What was said before, by the exception's name and words.
    Again(&'static str, String),
    /// Already an exception.
    Python(PyErr),
}

impl Failure {
    fn class(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "InvalidArgument",
            Self::Type(_) => "InvalidType",
            Self::Unknown(_) => "UnknownTicket",
            Self::Closed(_) => "Closed",
            Self::Forked => "Forked",
            Self::Device(_) => "DeviceUnsupported",
            Self::Lost(_) => "PeerLost",
            Self::Peer(_) => "PeerFailed",
            Self::Timeout(_) => "Timeout",
            Self::Mesh(error) => mesh_class(error),
            Self::Control(error) => control_class(error),
            Self::Again(class, _) => class,
            Self::Python(_) => "StepmeshError",
        }
    }

    /// To be raised another time.
    pub(crate) fn again(&self) -> Self {
        Self::Again(self.class(), self.words())
    }

    pub(crate) fn words(&self) -> String {
        match self {
            Self::Invalid(words)
            | Self::Type(words)
            | Self::Unknown(words)
            | Self::Closed(words)
            | Self::Device(words)
            | Self::Lost(words)
            | Self::Peer(words)
            | Self::Timeout(words)
            | Self::Again(_, words) => words.clone(),
            Self::Forked => "this mesh was joined before a fork, in the parent process: join after forking, or use \
                             the `spawn` start method"
                .to_owned(),
            Self::Mesh(error) => error.to_string(),
            Self::Control(error) => error.to_string(),
            Self::Python(error) => error.to_string(),
        }
    }
}

fn mesh_class(error: &MeshError) -> &'static str {
    match error {
        MeshError::Layout(_) | MeshError::Transfer(_) | MeshError::NoMicrobatch { .. } => "InvalidArgument",
        MeshError::Memory { .. } => "MemoryLimit",
        MeshError::Transport(TransportError::Invalid { .. }) => "InvalidArgument",
        MeshError::Transport(TransportError::Cuda(error)) => cuda_class(error),
        MeshError::Refused(_) => "Refused",
        MeshError::SchedulerLost(_) => "SchedulerLost",
        MeshError::WouldBlock(_) => "WouldBlock",
        MeshError::NotLinked(_) => "NotLinked",
        MeshError::Timeout(_) => "Timeout",
        MeshError::UnknownTicket(_) => "UnknownTicket",
        MeshError::Ticket(TicketFailure::PeerLost { .. }) => "PeerLost",
        MeshError::Ticket(TicketFailure::PeerFailed { .. }) => "PeerFailed",
        MeshError::Ticket(TicketFailure::Cancelled) => "Cancelled",
        MeshError::Ended(error) => mesh_class(error),
        _ => "TransportFailed",
    }
}

fn cuda_class(error: &CudaError) -> &'static str {
    match error {
        CudaError::Invalid(_) => "InvalidArgument",
        CudaError::OutOfMemory { .. } => "MemoryLimit",
        CudaError::NoDriver | CudaError::TooOld { .. } | CudaError::NoDevice { .. } | CudaError::Incapable { .. } => {
            "DeviceUnsupported"
        }
        _ => "TransportFailed",
    }
}

fn control_class(error: &ControlError) -> &'static str {
    match error {
        ControlError::Address { .. } => "InvalidArgument",
        ControlError::Unauthenticated { .. }
        | ControlError::Version { .. }
        | ControlError::Refused(_)
        | ControlError::Overloaded(_) => "Refused",
        ControlError::System(_) => "TransportFailed",
        _ => "SchedulerLost",
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        if let Failure::Python(error) = failure {
            return error;
        }
        Python::attach(|py| {
            let class = py.import("stepmesh.errors").and_then(|module| module.getattr(failure.class()));
            let class = class.and_then(|class| Ok(class.cast_into::<PyType>()?));
            match class {
                Ok(class) => PyErr::from_type(class, failure.words()),
                Err(error) => error,
            }
        })
    }
}

impl From<MeshError> for Failure {
    fn from(error: MeshError) -> Self {
        Self::Mesh(error)
    }
}

impl From<TransportError> for Failure {
    fn from(error: TransportError) -> Self {
        Self::Mesh(error.into())
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        Self::Control(error)
    }
}

impl From<ListError> for Failure {
    fn from(error: ListError) -> Self {
        Self::Invalid(error.to_string())
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl From<JoinError> for Failure {
    fn from(error: JoinError) -> Self {
        match error {
            JoinError::Transport(error) => error.into(),
            JoinError::Control(error) => error.into(),
            JoinError::Mesh(error) => error.into(),
            error => Self::Closed(error.to_string()),
        }
    }
}
