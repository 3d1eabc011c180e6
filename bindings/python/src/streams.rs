//! The program's CUDA streams, by their handles.

use crate::error::Failure;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use stepmesh_transport::TransportError;
use stepmesh_transport::cuda::{Context, CudaError, Stream};

pub(crate) struct Streams {
    context: Arc<Context>,
    known: Mutex<HashMap<usize, Stream>>,
}

impl Streams {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { context, known: Mutex::default() }
    }

    /// Calls with the stream of that handle.
    pub(crate) fn on(&self, handle: usize, call: impl FnOnce(&Stream) -> Result<(), CudaError>) -> Result<(), Failure> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the program promises a stream of this GPU; one that is gone is never named again.
        let new = || unsafe { Stream::of_engine(&self.context, handle as *mut _) };
        Ok(call(known.entry(handle).or_insert_with(new)).map_err(TransportError::from)?)
    }
}
