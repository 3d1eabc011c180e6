//! Gates: how a CUDA stream of an engine's and this process's CPU signal each other, also in captured graphs.

use crate::error::Failure;
use crate::streams::Streams;
use pyo3::prelude::*;
use stepmesh_transport::cuda::{self, Context, Gate};
use stepmesh_transport::{GateSet, TransportError};

/// The gates of a step, one for each transfer.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct Gates {
    gates: cuda::Gates,
    streams: Streams,
}

impl Gates {
    fn gate(&self, gate: usize) -> Result<Gate, Failure> {
        let count = self.gates.len();
        self.gates.gate(gate).ok_or_else(|| Failure::Invalid(format!("gate: {gate} of {count}")))
    }
}

#[pymethods]
impl Gates {
    #[new]
    #[pyo3(signature = (count, gpu=0))]
    fn new(count: usize, gpu: u32) -> PyResult<Self> {
        let make = || {
            let context = Context::open(gpu)?;
            let gates = cuda::Gates::new(&context, count)?;
            Ok::<_, TransportError>(Self { gates, streams: Streams::new(context) })
        };
        Ok(make().map_err(Failure::from)?)
    }

    fn __len__(&self) -> usize {
        self.gates.len()
    }

    /// Has the stream tell the CPU that all before it is done. `stream` is a handle, such as PyTorch's `stream.cuda_stream`.
    fn announce(&self, gate: usize, stream: usize) -> PyResult<()> {
        let gate = self.gate(gate)?;
        Ok(self.streams.on(stream, |stream| gate.announce(stream))?)
    }

    /// Has the stream wait until the CPU opens the gate.
    fn hold(&self, gate: usize, stream: usize) -> PyResult<()> {
        let gate = self.gate(gate)?;
        Ok(self.streams.on(stream, |stream| gate.pass(stream))?)
    }

    /// Whether the stream has announced here since this was last true.
    fn take(&self, gate: usize) -> PyResult<bool> {
        self.gate(gate)?;
        Ok(self.gates.take(gate))
    }

    /// Lets the stream go on.
    fn open(&self, gate: usize) -> PyResult<()> {
        self.gate(gate)?;
        self.gates.open(gate);
        Ok(())
    }

    /// Opens every gate: what the streams compute now is worth nothing.
    fn abort(&self) {
        self.gates.abort();
    }

    /// Whether what the streams compute now is worth nothing.
    #[getter]
    fn aborted(&self) -> bool {
        self.gates.is_aborted()
    }

    /// Closes all gates after an abort; the stream must be idle.
    fn reset(&self, stream: usize) -> PyResult<()> {
        Ok(self.streams.on(stream, |stream| self.gates.reset(stream))?)
    }
}
