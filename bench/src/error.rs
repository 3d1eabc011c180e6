//! Why a suite could not be run.

use std::io;
use stepmesh_mesh::MeshError;
use stepmesh_mesh::control::ControlError;
use stepmesh_mesh::scheduler::{OptionsError, ServeError};
use stepmesh_model::ModelError;
use stepmesh_pipeline::DaemonError;
use stepmesh_transport::cuda::CudaError;
use stepmesh_transport::{Disconnect, PostError, TransportError};
use thiserror::Error;

/// What went wrong; what had been measured before is in the report.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BenchError {
    /// Two spinning ends need a CPU each.
    #[error("{0} CPU to run on: the suite spins on two (see `taskset -p $$`)")]
    Cpus(usize),
    /// Two spinning ends on one CPU would wait for each other's time slices.
    #[error("both ends on CPU {0}: two ends that spin need two CPUs")]
    SameCpu(usize),
    /// This process may not run there.
    #[error("CPU {cpu} is not among those that this process may use: {allowed:?}")]
    NoCpu {
        /// The one that was asked for.
        cpu: usize,
        /// Those that there are.
        allowed: Vec<usize>,
    },
    /// The kernel lets no thread of this process be real-time.
    #[error("no real-time threads for this process: {0}; they take root, CAP_SYS_NICE or `ulimit -r 1`")]
    Scheduling(#[source] io::Error),
    /// The caller has had enough.
    #[error("interrupted")]
    Interrupted,
    /// The provider refused a call.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The provider took no work.
    #[error("posting: {0}")]
    Post(#[from] PostError),
    /// A member failed.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// An executor failed.
    #[error(transparent)]
    Executor(#[from] DaemonError),
    /// The GPU or its driver.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The stages' model could not be made.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A sequence did not come to its end.
    #[error("a sequence was not decoded: {0}")]
    Sequence(String),
    /// There is no such deployment.
    #[error(transparent)]
    Deployment(#[from] OptionsError),
    /// The scheduler of two processes does not serve.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// It cannot be reached, or refuses.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The two ends did not connect in time.
    #[error("the two ends did not connect within {0} seconds")]
    NotConnected(u64),
    /// The link ended during the run.
    #[error("the link ended during the run: {0}")]
    Ended(Disconnect),
    /// An earlier measurement had left something on its way.
    #[error("an immediate {stray:#x} over {provider} that nobody waits for")]
    Stray {
        /// What it said.
        stray: u32,
        /// Over what.
        provider: &'static str,
    },
    /// The bytes that arrived were not those that were sent.
    #[error("{bytes} bytes arrived damaged over {provider}")]
    Damaged {
        /// Of how many bytes a transfer was.
        bytes: usize,
        /// Over what.
        provider: &'static str,
    },
    /// Another system's program could not be run.
    #[error("{peer}: {reason}")]
    Peer {
        /// Which.
        peer: String,
        /// What it said.
        reason: String,
    },
    /// The floor could not be taken.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A histogram could not be made.
    #[error(transparent)]
    Histogram(#[from] hdrhistogram::CreationError),
    /// The other end has failed, and says why.
    #[error("the other end has stopped")]
    Stopped,
    /// A measuring thread could not be started, or panicked.
    #[error("a measuring thread is lost")]
    Thread,
}

impl BenchError {
    /// For `map_err`.
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}
