//! How an endpoint sleeps: on completions, the device's events and its waker at once.

use crate::{TransportError, Wake};
use rustix::event::{EventfdFlags, Timespec, epoll};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// See the module.
pub(super) struct Sleep {
    epoll: OwnedFd,
    waker: Arc<EventWaker>,
}

impl Sleep {
    /// Watches the given descriptors.
    pub(super) fn new(watched: &[BorrowedFd<'_>]) -> Result<Self, TransportError> {
        let fail = |errno| TransportError::system("making an event queue", errno);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(fail)?;
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(fail)?;
        let waker = Arc::new(EventWaker { event, woken: AtomicBool::new(false) });
        for fd in watched.iter().chain(&[waker.event.as_fd()]) {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN).map_err(fail)?;
        }
        Ok(Self { epoll, waker })
    }

    /// Sleeps until something happens, at most `timeout`.
    pub(super) fn sleep(&self, timeout: Duration) -> Result<(), TransportError> {
        // A timeout that no clock holds is as good as a day.
        let timeout = timeout.min(Duration::from_secs(86_400));
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        match epoll::wait(&self.epoll, &mut [MaybeUninit::uninit(); 4], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(TransportError::system("waiting for events", errno)),
        }
    }

    /// Whether somebody woke this endpoint; takes the wakes back.
    pub(super) fn was_woken(&self) -> bool {
        let woken = self.waker.woken.swap(false, Ordering::AcqRel);
        if woken {
            let _ = rustix::io::read(&self.waker.event, &mut [0; 8]);
        }
        woken
    }

    /// The waker.
    pub(super) fn waker(&self) -> Arc<EventWaker> {
        self.waker.clone()
    }
}

/// Wakes by an eventfd; the flag tells of it without a system call.
pub(super) struct EventWaker {
    event: OwnedFd,
    woken: AtomicBool,
}

impl Wake for EventWaker {
    fn wake(&self) {
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        self.woken.store(true, Ordering::Release);
    }
}
