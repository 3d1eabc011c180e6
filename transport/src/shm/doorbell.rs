//! The doorbell of an endpoint: one page, mapped by all of its peers, on which the endpoint sleeps and they wake it.
//!
//! No wake-up is lost: the sleeper raises `sleeping`, fences and looks at its rings again; the ringer writes its ring,
//! fences and looks at `sleeping`. One of the two sees the other. A peer that scribbles over the page can only wake the
//! endpoint or let it sleep out its slice.

use super::memory::{self, Mapping};
use crate::{TransportError, Wake, page_bytes};
use rustix::thread::futex;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::time::Duration;

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
        fence(Ordering::SeqCst);
        if self.sleeping().load(Ordering::Relaxed) != 0 && self.sleeping().swap(0, Ordering::Relaxed) != 0 {
            self.knock();
        }
    }

    fn knock(&self) {
        self.knocks().fetch_add(1, Ordering::Release);
        let _ = futex::wake(self.knocks(), futex::Flags::empty(), 1);
    }

    /// Counts the wake-ups; the futex word.
    fn knocks(&self) -> &AtomicU32 {
        self.word(0)
    }

    fn sleeping(&self) -> &AtomicU32 {
        self.word(4)
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: `offset` is 0 or 4, inside the page that is mapped; every access by any process is atomic.
        unsafe { self.mapping.base().add(offset).cast::<AtomicU32>().as_ref() }
    }
}

/// This side's doorbell.
pub(super) struct OwnDoorbell {
    bell: Doorbell,
    fd: OwnedFd,
    woken: AtomicBool,
}

impl OwnDoorbell {
    pub(super) fn create() -> Result<Self, TransportError> {
        let fd = memory::create("stepmesh-doorbell", page_bytes())?;
        memory::seal(&fd, false)?;
        let mapping = Mapping::new(fd.as_fd(), page_bytes(), true, None)?;
        Ok(Self { bell: Doorbell { mapping }, fd, woken: AtomicBool::new(false) })
    }

    /// What peers map.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether a waker has called since the last time; forgets it.
    pub(super) fn take_wake(&self) -> bool {
        self.woken.load(Ordering::Relaxed) && self.woken.swap(false, Ordering::Acquire)
    }

    /// Sleeps until somebody rings, at most `slice`, unless `ready` finds something to do. Returns what `ready` said.
    pub(super) fn sleep(&self, slice: Duration, ready: impl FnOnce() -> bool) -> bool {
        let knocks = self.bell.knocks().load(Ordering::Acquire);
        self.bell.sleeping().store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let ready = ready();
        if !ready && let Ok(slice) = slice.try_into() {
            // Interrupted, timed out, rung before: the caller looks in every case.
            let _ = futex::wait(self.bell.knocks(), futex::Flags::empty(), knocks, Some(&slice));
        }
        self.bell.sleeping().store(0, Ordering::Relaxed);
        ready
    }
}

impl Wake for OwnDoorbell {
    fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        self.bell.knock();
    }
}
