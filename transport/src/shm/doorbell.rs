//! The doorbell of an endpoint: one page, mapped by all of its peers, on which the endpoint sleeps and they wake it.
//!
//! No wake-up is lost: the sleeper raises `sleeping`, fences and looks at its rings again; the ringer writes its ring,
//! fences and looks at `sleeping`. One of the two sees the other. A peer that scribbles over the page can only wake the
//! endpoint or let it sleep out its slice.

use super::memory::{self, Mapping};
use crate::sync::{self, AtomicBool, AtomicU32, Futex, Ordering, fence};
use crate::{TransportError, Wake, page_bytes};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// What is on the page.
#[derive(Clone, Copy)]
struct Words<'a> {
    /// Counts the wake-ups.
    knocks: &'a Futex,
    /// 1 while the owner sleeps, or is about to, and nobody has knocked.
    sleeping: &'a AtomicU32,
}

impl Words<'_> {
    fn ring(self) {
        fence(Ordering::SeqCst);
        let relaxed = Ordering::Relaxed;
        // Of several that ring at once one knocks.
        if self.sleeping.load(relaxed) != 0 && self.sleeping.compare_exchange(1, 0, relaxed, relaxed).is_ok() {
            self.knock();
        }
    }

    fn knock(self) {
        self.knocks.increment(Ordering::Release);
        self.knocks.wake();
    }

    fn sleep(self, slice: Duration, ready: impl FnOnce() -> bool) -> bool {
        // Acquire: who knocked before this is not waited for, and what it did before is seen by `ready`.
        let knocks = self.knocks.load(Ordering::Acquire);
        self.sleeping.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let ready = ready();
        if !ready {
            self.knocks.wait(knocks, slice);
        }
        self.sleeping.store(0, Ordering::Relaxed);
        ready
    }
}

/// A mapped doorbell, of this side or of a peer.
pub(super) struct Doorbell {
    mapping: Mapping,
}

impl Doorbell {
    /// Maps a peer's, if it is as it should be.
    pub(super) fn adopt(fd: &OwnedFd) -> Result<Self, String> {
        memory::check(fd, page_bytes())?;
        let mapping = Mapping::new(fd.as_fd(), page_bytes(), true, None).map_err(|error| error.to_string())?;
        Ok(Self { mapping })
    }

    /// Wakes the owner if it sleeps. What the caller stored before is seen by the owner before it sleeps again.
    pub(super) fn ring(&self) {
        self.words().ring();
    }

    fn words(&self) -> Words<'_> {
        let base = self.mapping.base();
        // SAFETY: the first two words of the page that is mapped; every access by any process is atomic.
        unsafe { Words { knocks: sync::word(base), sleeping: sync::word(base.add(4)) } }
    }
}

/// This side's doorbell.
pub(super) struct OwnDoorbell {
    bell: Doorbell,
    fd: OwnedFd,
    woken: Woken,
}

impl OwnDoorbell {
    pub(super) fn create() -> Result<Self, TransportError> {
        let fd = memory::create("stepmesh-doorbell", page_bytes())?;
        memory::seal(&fd, false)?;
        let mapping = Mapping::new(fd.as_fd(), page_bytes(), true, None)?;
        Ok(Self { bell: Doorbell { mapping }, fd, woken: Woken::new() })
    }

    /// What peers map.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether a waker has called since the last time; forgets it.
    pub(super) fn take_wake(&self) -> bool {
        self.woken.take()
    }

    /// Sleeps until somebody rings, at most `slice`, unless `ready` finds something to do. Returns what `ready` said.
    pub(super) fn sleep(&self, slice: Duration, ready: impl FnOnce() -> bool) -> bool {
        self.bell.words().sleep(slice, ready)
    }
}

impl Wake for OwnDoorbell {
    fn wake(&self) {
        self.woken.wake(self.bell.words());
    }
}

/// That a waker has called: what it has to say is not in a ring.
struct Woken(AtomicBool);

impl Woken {
    fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    fn wake(&self, words: Words<'_>) {
        self.0.store(true, Ordering::Release);
        words.knock();
    }

    fn take(&self) -> bool {
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Acquire)
    }
}

#[cfg(all(test, stepmesh_loom))]
mod model;
