//! What both sides need of a GPU: spans of slots, room of the device's own beside slots in host memory, and words that say that a
//! stream has come to a point.

use crate::DaemonError;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_transport::cuda::{Context, CudaError, DeviceMemory, Gates, Span, Stream};
use stepmesh_transport::{GateSet, Region};

/// How long a stream may take to its end when its instance goes.
const END: Duration = Duration::from_secs(5);
/// How long a stream may take from one point to the next.
const PATIENCE: Duration = Duration::from_secs(60);

/// The first bytes of a place in a slot.
pub(crate) fn span(place: Option<(Region, Range<usize>)>, bytes: usize) -> Result<Span, DaemonError> {
    let (region, range) = place.ok_or_else(|| CudaError::Invalid("there is no such slot".into()))?;
    if bytes > range.len() {
        return Err(CudaError::Invalid(format!("{bytes} bytes in a place for {}", range.len())).into());
    }
    Ok(Span::new(&region, range.start..range.start + bytes)?)
}

/// Lets a stream come to its end before the code and the weights that its work needs are given back. Nothing on it waits for the CPU.
pub(crate) fn end(stream: &Stream) {
    if let Err(error) = stream.finish(END) {
        tracing::warn!("work on the GPU did not end: {error}");
    }
}

/// Device memory that grows to the largest need and then stays. One stream works with it, in order: who takes it again is behind
/// who had it.
#[derive(Default)]
pub(crate) struct Room(Option<Span>);

impl Room {
    pub(crate) fn of(&mut self, context: &Arc<Context>, bytes: usize) -> Result<Span, CudaError> {
        if let Some(span) = self.0.as_ref().filter(|span| span.len() >= bytes) {
            return span.part(0..bytes);
        }
        let region = Region::new(DeviceMemory::allocate(context, bytes.max(1).next_power_of_two())?);
        self.0.insert(Span::new(&region, 0..region.len())?).part(0..bytes)
    }
}

/// Points that a stream comes to, each in its turn under way once at most.
pub(crate) struct Points {
    gates: Gates,
    since: Vec<Option<Instant>>,
}

impl Points {
    pub(crate) fn new(context: &Arc<Context>, count: usize) -> Result<Self, CudaError> {
        Ok(Self { gates: Gates::new(context, count)?, since: vec![None; count] })
    }

    /// Before a stream reads what has arrived, and the CPU knows of: a device that does not order the writes of network devices
    /// flushes them here.
    pub(crate) fn arrive(&self, point: usize, stream: &Stream) -> Result<(), CudaError> {
        match self.gates.gate(point).filter(|_| stream.context().flushes()) {
            Some(gate) => {
                self.gates.open(point);
                gate.pass(stream)
            }
            None => Ok(()),
        }
    }

    /// Puts a point behind all that is on the stream.
    pub(crate) fn put(&mut self, point: usize, stream: &Stream) -> Result<(), CudaError> {
        if let Some(gate) = self.gates.gate(point) {
            gate.announce(stream)?;
            self.since[point] = Some(Instant::now());
        }
        Ok(())
    }

    /// Whether the stream has come to it, or it was never put.
    ///
    /// # Errors
    /// The stream takes too long.
    pub(crate) fn is_passed(&mut self, point: usize) -> Result<bool, CudaError> {
        let Some(since) = self.since[point] else { return Ok(true) };
        if self.gates.take(point) {
            self.since[point] = None;
            return Ok(true);
        }
        // Who asks again and again must let others have the processor.
        std::thread::yield_now();
        if since.elapsed() > PATIENCE {
            let reason = format!("the GPU has not come to the end of a layer within {PATIENCE:?}");
            return Err(CudaError::Invalid(reason));
        }
        Ok(false)
    }
}
