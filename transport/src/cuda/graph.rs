//! Work that is captured once and replayed any number of times.

use super::stream::Kept;
use super::{Context, CudaError, Stream};
use cudarc::driver::sys::{self, CUgraphExec, CUstreamCaptureMode};
use std::fmt;
use std::ptr;
use std::sync::Arc;

/// A captured piece of work. It keeps the memory that it refers to.
pub struct Graph {
    context: Arc<Context>,
    raw: CUgraphExec,
    held: Arc<Kept>,
}

// SAFETY: a graph may be launched from any thread; the driver locks.
unsafe impl Send for Graph {}
// SAFETY: as above; launches are ordered by their stream.
unsafe impl Sync for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({:p}, GPU {})", self.raw, self.context.index())
    }
}

impl Graph {
    /// What `work` puts on `stream`, which is idle, and which does none of it now.
    ///
    /// # Errors
    /// Those of `work`; [`CudaError::Capture`] if some of it cannot be captured; [`CudaError::Invalid`] if the stream has
    /// work under way.
    pub fn capture(stream: &Stream, work: impl FnOnce(&Stream) -> Result<(), CudaError>) -> Result<Self, CudaError> {
        if !stream.is_idle()? {
            return Err(CudaError::Invalid("capturing a stream that has work under way".into()));
        }
        let context = stream.context().clone();
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is valid; the capture is ended below in every case.
        let begin = || unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) };
        context.ask("cuStreamBeginCapture", begin)?.map_err(|name| CudaError::Capture { name })?;
        let done = work(stream);
        let mut captured = ptr::null_mut();
        // SAFETY: the pointer is valid; destroyed below.
        let ended =
            context.ask("cuStreamEndCapture", || unsafe { sys::cuStreamEndCapture(stream.raw(), &mut captured) });
        let held = Arc::new(std::mem::take(&mut stream.held().memory));
        let built = match (done, ended) {
            (Err(error), _) | (_, Err(error)) => Err(error),
            (_, Ok(Err(name))) => Err(CudaError::Capture { name }),
            (Ok(()), Ok(Ok(()))) => {
                let mut raw = ptr::null_mut();
                // SAFETY: the graph was just captured.
                let build = || unsafe { sys::cuGraphInstantiateWithFlags(&mut raw, captured, 0) };
                let built = context.ask("cuGraphInstantiate", build);
                built.and_then(|built| built.map(|()| raw).map_err(|name| CudaError::Capture { name }))
            }
        };
        if !captured.is_null() {
            // SAFETY: captured once; what was built from it does not need it.
            let _ = context.call("cuGraphDestroy", || unsafe { sys::cuGraphDestroy(captured) });
        }
        Ok(Self { context, raw: built?, held })
    }

    /// Puts all of it on `stream`, behind what is there.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.hold_graph(&self.held);
        // SAFETY: both are valid, and what the graph refers to is kept until the stream is idle.
        self.context.call("cuGraphLaunch", || unsafe { sys::cuGraphLaunch(self.raw, stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: built once. A launch that is under way goes on: the driver keeps what it needs, the stream the memory.
        let _ = self.context.call("cuGraphExecDestroy", || unsafe { sys::cuGraphExecDestroy(self.raw) });
    }
}
