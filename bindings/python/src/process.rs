//! The process around the meshes: forks, and the interpreter's end.

use pyo3::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Forks that lie between this process and the one that loaded the module.
static FORKS: AtomicU32 = AtomicU32::new(0);
/// The interpreter ends.
static ENDING: AtomicBool = AtomicBool::new(false);
/// Threads that wait without the interpreter's lock.
static WAITING: AtomicUsize = AtomicUsize::new(0);
static OPEN: Mutex<Vec<Weak<dyn Open>>> = Mutex::new(Vec::new());
/// The longest that the interpreter's end waits for threads to come back.
const COMING_BACK: Duration = Duration::from_secs(2);

/// Something that waits, and that is closed before the interpreter ends.
pub(crate) trait Open: Send + Sync {
    /// Ends the waits.
    fn wake(&self);
    /// Leaves.
    fn close(&self);
}

extern "C" fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    // The threads that waited are the parent's.
    WAITING.store(0, Ordering::SeqCst);
}

/// Has forks counted.
pub(crate) fn watch_forks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only touches atomics.
        let _ = unsafe { libc::pthread_atfork(None, None, Some(forked)) };
    });
}

/// Which process this is, counted in forks.
pub(crate) fn generation() -> u32 {
    FORKS.load(Ordering::Relaxed)
}

pub(crate) fn is_ending() -> bool {
    ENDING.load(Ordering::Relaxed)
}

/// Has it woken and closed at the interpreter's end.
pub(crate) fn register<T: Open + 'static>(open: &Arc<T>) {
    let mut all = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|open| open.strong_count() > 0);
    let open: Weak<T> = Arc::downgrade(open);
    all.push(open);
}

/// Runs `body` without the interpreter's lock, and lets its end wait until the lock is taken again: a thread that comes
/// back to an interpreter that is gone would be torn out of Rust's frames.
pub(crate) fn detached<R: Send>(py: Python<'_>, body: impl FnOnce() -> R + Send) -> R {
    WAITING.fetch_add(1, Ordering::SeqCst);
    let result = py.detach(body);
    WAITING.fetch_sub(1, Ordering::SeqCst);
    result
}

/// Called by `atexit`: ends all waits and leaves all meshes.
#[pyfunction]
pub(crate) fn end(py: Python<'_>) {
    if generation() > 0 && OPEN.try_lock().is_err() {
        return;
    }
    ENDING.store(true, Ordering::SeqCst);
    let open: Vec<_> = {
        let all = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter_map(Weak::upgrade).collect()
    };
    py.detach(move || {
        let deadline = Instant::now() + COMING_BACK;
        while WAITING.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            open.iter().for_each(|open| open.wake());
            std::thread::sleep(Duration::from_millis(1));
        }
        open.iter().for_each(|open| open.close());
    });
}
