//! Gates: how a stream and the CPU signal each other without a kernel, in work that can be captured and replayed.
//!
//! A gate has two words in pinned host memory, both closed (0) at rest:
//!
//! ```text
//!   stream                               CPU
//!   … produce a tensor
//!   announce: out = 1       ─────────▶   take: out is 1; out = 0; send the tensor
//!   … other microbatches
//!   pass: wait until in = 1 ◀─────────   open: the reply has landed; in = 1
//!         in = 0
//!   … consume the reply
//! ```
//!
//! The marker is the constant 1, and the wait takes it back in the same batch: a graph has its values baked in, and its next
//! replay finds the gate closed. The CPU looks at words, never at events.
//!
//! **What makes data visible before its flag.** Outwards: a write value is ordered behind all that precedes it on its stream
//! (the driver's memory barrier for `cuStreamWriteValue64`), and the CPU's acquiring load comes before what it posts. Inwards:
//! the completion says that the bytes are in device memory; the releasing store of `open` comes behind it. Writes of network
//! devices are then seen by what follows the wait if the device orders them at least for itself
//! (`CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING` is `OWNER` or more); where it does not, the wait flushes them
//! (`CU_STREAM_WAIT_VALUE_FLUSH`). [`Context::open`] refuses a device that can do neither.

use super::word::{wait, write};
use super::{Context, CudaError, Stream, Word};
use crate::{GateSet, Memory};
use cudarc::driver::sys::{self, CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CUdeviceptr};
use std::any::Any;
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const CLOSED: u64 = 0;
const OPEN: u64 = 1;
/// Gates of one set: more than a step has.
const MOST: usize = 1 << 16;

/// A cache line of one word: the two sides do not disturb each other.
#[repr(C, align(64))]
struct Line(AtomicU64);

#[repr(C)]
struct Words {
    out: Line,
    r#in: Line,
}

/// The gates of a step, and its way to give up: dropped, they open.
pub struct Gates {
    words: Arc<Pinned>,
    aborted: AtomicBool,
}

/// Host memory that the device reads and writes, too.
struct Pinned {
    context: Arc<Context>,
    host: NonNull<Words>,
    device: CUdeviceptr,
    count: usize,
}

// SAFETY: words are reached by atomic operations only, from any thread.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

// SAFETY: pinned until the value is dropped.
unsafe impl Memory for Pinned {
    fn base(&self) -> NonNull<u8> {
        self.host.cast()
    }

    fn len(&self) -> usize {
        self.count * size_of::<Words>()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated once; whoever refers to it keeps it, so nobody does.
        let freed = self.context.call("cuMemFreeHost", || unsafe { sys::cuMemFreeHost(self.host.as_ptr().cast()) });
        if let Err(error) = freed {
            tracing::warn!("freeing the words of {} gates: {error}", self.count);
        }
    }
}

impl Pinned {
    fn words(&self) -> &[Words] {
        // SAFETY: allocated for so many, zeroed, and all of it is atomics.
        unsafe { std::slice::from_raw_parts(self.host.as_ptr(), self.count) }
    }
}

/// Nobody can open them any more, and what waits at one would wait for ever; so would whoever frees the device's memory, for
/// the driver waits for all work first.
impl Drop for Gates {
    fn drop(&mut self) {
        self.abort();
    }
}

impl fmt::Debug for Gates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gates({}, aborted: {})", self.words.count, self.is_aborted())
    }
}

impl Gates {
    /// `count` closed gates: one for each transfer of a step, as each must be closed when its turn comes.
    ///
    /// # Errors
    /// [`CudaError::Invalid`] for none or far too many; the driver refuses.
    pub fn new(context: &Arc<Context>, count: usize) -> Result<Self, CudaError> {
        if !(1..=MOST).contains(&count) {
            return Err(CudaError::Invalid(format!("{count} gates: 1 to {MOST} can be had")));
        }
        let (mut host, bytes) = (ptr::null_mut(), count * size_of::<Words>());
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the pointer is valid; freed when the words are dropped, or here.
        context.call("cuMemHostAlloc", || unsafe { sys::cuMemHostAlloc(&mut host, bytes, flags) })?;
        let Some(words) = NonNull::new(host.cast::<Words>()) else {
            return Err(CudaError::Invalid("the driver pinned memory at address zero".into()));
        };
        // SAFETY: so many bytes were just allocated, and nobody else has them.
        unsafe { words.cast::<u8>().write_bytes(0, bytes) };
        let mut pinned = Pinned { context: context.clone(), host: words, device: 0, count };
        let device = &mut pinned.device;
        // SAFETY: the pointers are valid; the memory was pinned for the device.
        context.call("cuMemHostGetDevicePointer", || unsafe { sys::cuMemHostGetDevicePointer_v2(device, host, 0) })?;
        Ok(Self { words: Arc::new(pinned), aborted: AtomicBool::new(false) })
    }

    /// One of them, if there are so many.
    pub fn gate(&self, index: usize) -> Option<Gate> {
        (index < self.words.count).then(|| Gate { words: self.words.clone(), index })
    }

    /// Closes all gates for another replay, after one that was given up. `stream` is the one that replays.
    ///
    /// # Errors
    /// [`CudaError::Invalid`] while the stream has work under way, which may yet announce or pass.
    pub fn reset(&self, stream: &Stream) -> Result<(), CudaError> {
        if !stream.is_idle()? {
            return Err(CudaError::Invalid("closing gates of a replay that is under way".into()));
        }
        for words in self.words.words() {
            words.out.0.store(CLOSED, Ordering::Release);
            words.r#in.0.store(CLOSED, Ordering::Release);
        }
        self.aborted.store(false, Ordering::Release);
        Ok(())
    }
}

impl GateSet for Gates {
    fn len(&self) -> usize {
        self.words.count
    }

    fn take(&self, gate: usize) -> bool {
        let Some(words) = self.words.words().get(gate) else { return false };
        // The stream does not write it again before the gate was opened, so nothing is lost in between.
        let announced = words.out.0.load(Ordering::Acquire) == OPEN;
        if announced {
            words.out.0.store(CLOSED, Ordering::Release);
        }
        announced
    }

    fn open(&self, gate: usize) {
        if let Some(words) = self.words.words().get(gate) {
            words.r#in.0.store(OPEN, Ordering::Release);
        }
    }

    fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        self.words.words().iter().for_each(|words| words.r#in.0.store(OPEN, Ordering::Release));
    }

    fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Acquire)
    }
}

/// One gate, as a stream sees it: see the module.
#[derive(Clone)]
pub struct Gate {
    words: Arc<Pinned>,
    index: usize,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gate({})", self.index)
    }
}

impl Gate {
    /// Tells the CPU that all before it on the stream is done.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn announce(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.batch(&mut [write(self.out(), Word::U64(OPEN))], self.words.clone())
    }

    /// Goes on when the CPU has opened the gate, and closes it.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn pass(&self, stream: &Stream) -> Result<(), CudaError> {
        let (open, closed) = (Word::U64(OPEN), Word::U64(CLOSED));
        let mut batch = [wait(self.r#in(), open, stream.flush()), write(self.r#in(), closed)];
        stream.batch(&mut batch, self.words.clone())
    }

    fn out(&self) -> CUdeviceptr {
        self.words.device + (self.index * size_of::<Words>()) as CUdeviceptr
    }

    fn r#in(&self) -> CUdeviceptr {
        self.out() + size_of::<Line>() as CUdeviceptr
    }
}
