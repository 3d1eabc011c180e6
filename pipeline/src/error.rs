//! Why a daemon ended.

use stepmesh_mesh::MeshError;
use stepmesh_mesh::control::ControlError;
use stepmesh_model::ModelError;
use stepmesh_transport::TransportError;
use stepmesh_transport::cuda::CudaError;
use thiserror::Error;

/// Every error of this crate's public calls.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// An option is out of its range.
    #[error("{0}")]
    Option(String),
    /// The checkpoint, or the arithmetic on it.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The mesh.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// The provider.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The GPU.
    #[error(transparent)]
    Gpu(#[from] CudaError),
    /// The scheduler.
    #[error(transparent)]
    Control(#[from] ControlError),
}

impl DaemonError {
    /// Whether what the user gave is at fault, rather than what befell the daemon.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Option(_) | Self::Mesh(MeshError::Layout(_) | MeshError::Memory { .. }))
    }
}
