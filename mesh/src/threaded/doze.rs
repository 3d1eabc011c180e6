//! How the progress thread goes to sleep without missing a command: it says so, fences, and looks for commands once
//! more; whoever gives a command fences and looks whether it sleeps. One of the two sees the other.

use crate::sync::{AtomicBool, Ordering, fence};

/// See the module.
pub(super) struct Doze {
    sleeping: AtomicBool,
    stopped: AtomicBool,
}

impl Doze {
    pub(super) fn new() -> Self {
        Self { sleeping: AtomicBool::new(false), stopped: AtomicBool::new(false) }
    }

    /// Says that there is something to look at: `wake` is called if the thread sleeps, or is about to.
    pub(super) fn nudge(&self, wake: impl FnOnce()) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) {
            wake();
        }
    }

    /// Tells the thread to end.
    pub(super) fn stop(&self, wake: impl FnOnce()) {
        self.stopped.store(true, Ordering::Release);
        self.nudge(wake);
    }

    /// Whether the thread shall end.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// On the progress thread: `sleep`s, unless there is something to look at.
    pub(super) fn doze<D, E>(
        &self,
        driver: &mut D,
        has_commands: impl FnOnce(&mut D) -> bool,
        sleep: impl FnOnce(&mut D) -> Result<(), E>,
    ) -> Result<(), E> {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let slept = if has_commands(driver) || self.is_stopped() { Ok(()) } else { sleep(driver) };
        self.sleeping.store(false, Ordering::Relaxed);
        slept
    }
}
