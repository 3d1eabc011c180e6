//! Which sockets have something to say: an epoll set that is only ever asked, never waited on.

use crate::{LinkId, TransportError};
use rustix::event::{Timespec, epoll};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

/// A watched socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Listener,
    /// A connection that has not proven itself, by its number.
    Candidate(u32),
    Link(LinkId),
}

impl Source {
    fn data(self) -> epoll::EventData {
        epoll::EventData::new_u64(match self {
            Self::Listener => 2 << 32,
            Self::Candidate(number) => 1 << 32 | u64::from(number),
            Self::Link(id) => u64::from(id.0),
        })
    }

    fn of(data: u64) -> Self {
        match (data >> 32, data as u32) {
            (0, id) => Self::Link(LinkId(id)),
            (1, number) => Self::Candidate(number),
            _ => Self::Listener,
        }
    }
}

/// The set. A socket leaves it when it is closed.
pub(super) struct Watch {
    epoll: OwnedFd,
}

impl Watch {
    pub(super) fn new() -> Result<Self, TransportError> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)? })
    }

    pub(super) fn add(&self, fd: impl AsFd, source: Source) -> Result<(), TransportError> {
        epoll::add(&self.epoll, fd, source.data(), epoll::EventFlags::IN).map_err(failed)
    }

    /// Lets a watched socket stand for something else.
    pub(super) fn rename(&self, fd: impl AsFd, source: Source) -> Result<(), TransportError> {
        epoll::modify(&self.epoll, fd, source.data(), epoll::EventFlags::IN).map_err(failed)
    }

    /// Hears no more of a socket until it is renamed.
    pub(super) fn mute(&self, fd: impl AsFd, source: Source) -> Result<(), TransportError> {
        epoll::modify(&self.epoll, fd, source.data(), epoll::EventFlags::empty()).map_err(failed)
    }

    /// The sockets that have something to say now. Allocates nothing when there are none.
    pub(super) fn ready(&self) -> Result<Vec<Source>, TransportError> {
        let mut events = [MaybeUninit::uninit(); 64];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.epoll, &mut events, Some(&now)) {
            Ok((events, _)) => Ok(events.iter().map(|event| Source::of(event.data.u64())).collect()),
            Err(rustix::io::Errno::INTR) => Ok(Vec::new()),
            Err(errno) => Err(failed(errno)),
        }
    }
}

fn failed(errno: rustix::io::Errno) -> TransportError {
    TransportError::system("watching the sockets of shm", errno)
}
