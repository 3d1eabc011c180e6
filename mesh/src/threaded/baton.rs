//! Which of the two threads has the member in its hands.
//!
//! The application's thread takes it with every call, and drives it while it waits. The progress thread takes it when calls have
//! stopped coming, and sleeps with it, until a call comes. Neither waits for the lock itself: whoever wants what the other has says so,
//! fences, and looks whether the other sleeps; whoever goes to sleep says so, fences, and looks whether it is wanted. One of the
//! two sees the other.

use crate::MeshError;
use crate::sync::{AtomicBool, AtomicU32, Mutex, MutexGuard, Ordering, fence};
use std::sync::TryLockError;

/// See the module.
pub(super) struct Baton<T> {
    value: Mutex<T>,
    /// Counts the application's calls.
    visits: AtomicU32,
    /// The application wants the value, and the progress thread had it.
    wanted: AtomicBool,
    /// The progress thread sleeps with the value, or is about to.
    sleeping: AtomicBool,
    /// The progress thread waits until the application has given the value back, or is about to.
    waiting: AtomicBool,
    stopped: AtomicBool,
}

impl<T> Baton<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            value: Mutex::new(value),
            visits: AtomicU32::new(0),
            wanted: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        }
    }

    /// The value, if the other thread does not have it.
    pub(super) fn try_take(&self) -> Result<Option<MutexGuard<'_, T>>, MeshError> {
        match self.value.try_lock() {
            Ok(value) => Ok(Some(value)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Poisoned(_)) => Err(MeshError::Panicked),
        }
    }

    /// On the application's thread: the value. While the progress thread has it, `wake`s that if it sleeps, and `rest`s.
    pub(super) fn take(&self, wake: impl Fn(), rest: impl Fn()) -> Result<MutexGuard<'_, T>, MeshError> {
        self.visits.fetch_add(1, Ordering::Relaxed);
        if let Some(value) = self.try_take()? {
            return Ok(value);
        }
        loop {
            self.wanted.store(true, Ordering::Relaxed);
            self.nudge(&wake);
            if let Some(value) = self.try_take()? {
                self.wanted.store(false, Ordering::Relaxed);
                return Ok(value);
            }
            rest();
        }
    }

    /// On the application's thread, which has given the value back: `resume`s the progress thread if it waits for that.
    pub(super) fn left(&self, resume: impl FnOnce()) {
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) {
            resume();
        }
    }

    fn nudge(&self, wake: impl FnOnce()) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) {
            wake();
        }
    }

    /// Tells the progress thread to end, whatever it waits for.
    pub(super) fn stop(&self, wake: impl FnOnce(), resume: impl FnOnce()) {
        self.stopped.store(true, Ordering::Release);
        self.nudge(wake);
        resume();
    }

    /// Whether the progress thread shall end.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// On the progress thread: whether the application has called since `seen`, or waits to be given the value.
    pub(super) fn is_visited(&self, seen: &mut u32) -> bool {
        let before = std::mem::replace(seen, self.visits.load(Ordering::Relaxed));
        *seen != before || self.wanted.load(Ordering::Relaxed)
    }

    /// On the progress thread: `sleep`s with the value, unless it is wanted.
    pub(super) fn sleep_with<E>(&self, value: &mut T, sleep: impl FnOnce(&mut T) -> Result<(), E>) -> Result<(), E> {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let is_wanted = self.wanted.load(Ordering::Relaxed) || self.is_stopped();
        let slept = if is_wanted { Ok(()) } else { sleep(value) };
        self.sleeping.store(false, Ordering::Relaxed);
        slept
    }

    /// On the progress thread: `park`s while the application has the value.
    pub(super) fn await_departure(&self, park: impl FnOnce()) {
        self.waiting.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.is_stopped() && matches!(self.value.try_lock(), Err(TryLockError::WouldBlock)) {
            park();
        }
        self.waiting.store(false, Ordering::Relaxed);
    }
}
