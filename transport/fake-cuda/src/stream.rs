//! Streams: operations in order, on a thread of their own; and graphs of them.

use crate::machine;
use cudarc::driver::sys::{CUresult, CUstreamWaitValue_flags as Wait};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// One operation, its addresses checked.
#[derive(Clone)]
pub(crate) enum Operation {
    Copy { to: usize, from: usize, len: usize },
    Set { to: usize, value: u8, len: usize },
    Write { to: usize, value: u64, wide: bool },
    Wait { at: usize, value: u64, wide: bool, flags: u32 },
    Call(Arc<dyn Fn() + Send + Sync>),
}

pub(crate) struct Stream {
    queue: Sender<Vec<Operation>>,
    /// Operations that are not over.
    pending: Arc<AtomicUsize>,
    /// The number of a capture and what it has gathered, while there is one.
    capture: Mutex<Option<(u64, Vec<Operation>)>>,
}

impl Stream {
    pub(crate) fn start() -> Self {
        let (queue, work) = channel();
        let pending = Arc::new(AtomicUsize::new(0));
        let left = pending.clone();
        // It ends when the stream's sender is dropped.
        std::thread::spawn(move || run(&work, &left));
        Self { queue, pending, capture: Mutex::new(None) }
    }

    /// Adds operations that nothing comes between.
    pub(crate) fn add(&self, operations: Vec<Operation>) {
        match &mut *self.captured() {
            Some((_, captured)) => captured.extend(operations),
            None => {
                self.pending.fetch_add(operations.len(), Ordering::AcqRel);
                let _ = self.queue.send(operations);
            }
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0
    }

    pub(crate) fn is_capturing(&self) -> bool {
        self.capture_id().is_some()
    }

    pub(crate) fn capture_id(&self) -> Option<u64> {
        self.captured().as_ref().map(|(id, _)| *id)
    }

    pub(crate) fn begin_capture(&self) -> CUresult {
        let mut captured = self.captured();
        if captured.is_some() {
            return CUresult::CUDA_ERROR_ILLEGAL_STATE;
        }
        static IDS: AtomicU64 = AtomicU64::new(1);
        *captured = Some((IDS.fetch_add(1, Ordering::Relaxed), Vec::new()));
        CUresult::CUDA_SUCCESS
    }

    pub(crate) fn end_capture(&self) -> Option<Vec<Operation>> {
        self.captured().take().map(|(_, operations)| operations)
    }

    fn captured(&self) -> std::sync::MutexGuard<'_, Option<(u64, Vec<Operation>)>> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The stream that is meant by none.
pub(crate) fn default() -> &'static Stream {
    static DEFAULT: OnceLock<Stream> = OnceLock::new();
    DEFAULT.get_or_init(Stream::start)
}

fn run(work: &Receiver<Vec<Operation>>, pending: &AtomicUsize) {
    for operations in work {
        for operation in operations {
            perform(operation);
            pending.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// How long a copy takes longer than the processor does for it: `STEPMESH_FAKE_CUDA_COPY_US`.
fn copy_time() -> Duration {
    static TIME: OnceLock<Duration> = OnceLock::new();
    *TIME.get_or_init(|| {
        let us = std::env::var("STEPMESH_FAKE_CUDA_COPY_US").ok().and_then(|us| us.parse().ok());
        Duration::from_micros(us.unwrap_or(0))
    })
}

fn perform(operation: Operation) {
    match operation {
        Operation::Copy { to, from, len } => {
            std::thread::sleep(copy_time());
            // SAFETY: the ranges were checked when the operation was added, and stay until it is over by the driver's contract.
            unsafe { std::ptr::copy(from as *const u8, to as *mut u8, len) }
        }
        // SAFETY: as above.
        Operation::Set { to, value, len } => unsafe { std::ptr::write_bytes(to as *mut u8, value, len) },
        Operation::Write { to, value, wide } => {
            // Ordered behind everything before it, for whoever sees the value.
            if wide {
                // SAFETY: as above; aligned, which was checked.
                unsafe { AtomicU64::from_ptr(to as *mut u64) }.store(value, Ordering::Release);
            } else {
                // SAFETY: as above.
                unsafe { std::sync::atomic::AtomicU32::from_ptr(to as *mut u32) }
                    .store(value as u32, Ordering::Release);
            }
        }
        Operation::Call(call) => call(),
        Operation::Wait { at, value, wide, flags } => {
            while !passes(at, value, wide, flags) {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
    }
}

fn passes(at: usize, value: u64, wide: bool, flags: u32) -> bool {
    let found = if wide {
        // SAFETY: as for all operations.
        unsafe { AtomicU64::from_ptr(at as *mut u64) }.load(Ordering::Acquire)
    } else {
        // SAFETY: as for all operations.
        u64::from(unsafe { std::sync::atomic::AtomicU32::from_ptr(at as *mut u32) }.load(Ordering::Acquire))
    };
    let kind = flags & 3;
    match () {
        () if kind == Wait::CU_STREAM_WAIT_VALUE_EQ as u32 => found == value,
        () if kind == Wait::CU_STREAM_WAIT_VALUE_AND as u32 => found & value != 0,
        () if kind == Wait::CU_STREAM_WAIT_VALUE_NOR as u32 => !(found | value) != 0,
        // Cyclic, as the driver compares.
        () if wide => found.wrapping_sub(value) as i64 >= 0,
        () => (found as u32).wrapping_sub(value as u32) as i32 >= 0,
    }
}

/// Where an aligned word of `bytes` is.
pub(crate) fn word(address: u64, bytes: usize) -> Result<usize, CUresult> {
    if !address.is_multiple_of(bytes as u64) {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    // A stream memory operation takes device addresses only.
    if address < machine::bias() {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    Ok(machine::get().reach(address, bytes)? as usize)
}
