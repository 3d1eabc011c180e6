//! Gates: how a CUDA stream of an engine's and this process's CPU signal each other, also in captured graphs.

use crate::error::Failure;
use pyo3::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use stepmesh_transport::cuda::{self, Context, CudaError, Gate, Stream};
use stepmesh_transport::{GateSet, TransportError};

/// The gates of a step, one for each transfer.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct Gates {
    context: Arc<Context>,
    gates: cuda::Gates,
    /// The engine's streams by their handles.
    streams: Mutex<HashMap<usize, Stream>>,
}

impl Gates {
    fn gate(&self, gate: usize) -> Result<Gate, Failure> {
        let count = self.gates.len();
        self.gates.gate(gate).ok_or_else(|| Failure::Invalid(format!("gate: {gate} of {count}")))
    }

    /// Calls with the stream of that handle.
    fn on(&self, stream: usize, call: impl FnOnce(&Stream) -> Result<(), CudaError>) -> Result<(), Failure> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller promises a stream of this GPU that lives as long as these gates.
        let new = || unsafe { Stream::of_engine(&self.context, stream as *mut _) };
        Ok(call(streams.entry(stream).or_insert_with(new)).map_err(TransportError::from)?)
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
            Ok::<_, TransportError>(Self { context, gates, streams: Mutex::default() })
        };
        Ok(make().map_err(Failure::from)?)
    }

    fn __len__(&self) -> usize {
        self.gates.len()
    }

    /// Has the stream tell the CPU that all before it is done. `stream` is a handle, such as PyTorch's `stream.cuda_stream`.
    fn announce(&self, gate: usize, stream: usize) -> PyResult<()> {
        let gate = self.gate(gate)?;
        Ok(self.on(stream, |stream| gate.announce(stream))?)
    }

    /// Has the stream wait until the CPU opens the gate.
    fn hold(&self, gate: usize, stream: usize) -> PyResult<()> {
        let gate = self.gate(gate)?;
        Ok(self.on(stream, |stream| gate.pass(stream))?)
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
        Ok(self.on(stream, |stream| self.gates.reset(stream))?)
    }
}
