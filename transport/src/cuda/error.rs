//! What can go wrong with a GPU, in words that say what to do.

use thiserror::Error;

/// A call to the driver was refused or failed; nothing was changed by it unless the variant says so.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no CUDA driver on this machine.
    #[error(
        "no CUDA driver: libcuda.so is not found; install the NVIDIA driver, or start the container with --gpus all"
    )]
    NoDriver,
    /// The driver lacks what is needed.
    #[error("the CUDA driver {found} is too old: {missing}; install one for CUDA 12.0 or later")]
    TooOld {
        /// Its version, such as `11.4`.
        found: String,
        /// What it lacks.
        missing: String,
    },
    /// There is no such device.
    #[error("GPU {index} does not exist: there are {count}; CUDA_VISIBLE_DEVICES hides those that it does not name")]
    NoDevice {
        /// The one asked for.
        index: u32,
        /// How many there are.
        count: u32,
    },
    /// The device cannot do it.
    #[error("GPU {index} cannot {what}")]
    Incapable {
        /// The device.
        index: u32,
        /// What it cannot do.
        what: &'static str,
    },
    /// There is not so much memory.
    #[error("GPU {index} has no {bytes} bytes left: {free} of {total} are free; free some, or ask for less")]
    OutOfMemory {
        /// The device.
        index: u32,
        /// Asked for.
        bytes: usize,
        /// Free now.
        free: usize,
        /// In all.
        total: usize,
    },
    /// The device has failed or was reset: everything on it is lost, and every later call fails alike.
    #[error(
        "GPU {index} is lost ({call}: {name}): everything on it is gone; `nvidia-smi` says why, and a new process may use it"
    )]
    Lost {
        /// The device.
        index: u32,
        /// The call that noticed.
        call: &'static str,
        /// The driver's name for it.
        name: String,
    },
    /// A handle of another process's memory cannot be opened.
    #[error(
        "the GPU memory of another process cannot be opened ({name}): it must still exist, on a GPU that this process sees, \
         of a process of the same host, user and PID namespace"
    )]
    Peer {
        /// The driver's name for the reason.
        name: String,
    },
    /// An argument is out of its range.
    #[error("{0}")]
    Invalid(String),
    /// A capture into a graph failed: something between its beginning and its end cannot be captured.
    #[error("the work on the stream cannot be captured into a graph ({name})")]
    Capture {
        /// The driver's name for the reason.
        name: String,
    },
    /// The driver refused a call.
    #[error("{call} failed on GPU {index}: {name}")]
    Refused {
        /// The device.
        index: u32,
        /// The call.
        call: &'static str,
        /// The driver's name for the reason.
        name: String,
    },
}
