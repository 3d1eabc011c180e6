//! The event queue of one endpoint: an epoll set, edge-triggered for connections, and the waker in it.

use crate::{LinkId, TransportError, Wake};
use rustix::event::{EventfdFlags, Timespec, epoll};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

const EVENTS: usize = 64;
const CONNECTION: epoll::EventFlags =
    epoll::EventFlags::IN.union(epoll::EventFlags::OUT).union(epoll::EventFlags::RDHUP).union(epoll::EventFlags::ET);

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Listener,
    Waker,
    /// An accepted connection that has proven nothing yet.
    Greeting(u64),
    /// A connection of a link, dialled, proven or in use.
    Lane(LinkId, u8),
    /// A closed lane.
    Linger(u64),
    /// A link as a whole; no event of the kernel's.
    Link(LinkId),
}

impl Token {
    fn encode(self) -> u64 {
        let (kind, value) = match self {
            Self::Listener => (0, 0),
            Self::Waker => (1, 0),
            Self::Greeting(id) => (2, id),
            Self::Lane(link, lane) => (3, u64::from(link.0) << 8 | u64::from(lane)),
            Self::Linger(id) => (4, id),
            Self::Link(link) => (5, u64::from(link.0)),
        };
        kind << 56 | value & ((1 << 56) - 1)
    }

    fn decode(bits: u64) -> Self {
        let value = bits & ((1 << 56) - 1);
        match bits >> 56 {
            0 => Self::Listener,
            1 => Self::Waker,
            2 => Self::Greeting(value),
            3 => Self::Lane(LinkId((value >> 8) as u32), value as u8),
            4 => Self::Linger(value),
            _ => Self::Link(LinkId(value as u32)),
        }
    }
}

/// An event: what about, and whether the stream is known to end.
pub(super) type Event = (Token, bool);

/// See the module.
pub(super) struct Poller {
    epoll: OwnedFd,
    waker: Arc<EventWaker>,
    events: [Event; EVENTS],
}

impl Poller {
    /// A set with nothing but the waker in it.
    pub(super) fn new() -> Result<Self, TransportError> {
        let fail = |errno| TransportError::system("making an event queue", errno);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(fail)?;
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(fail)?;
        let events = [(Token::Waker, false); EVENTS];
        let poller = Self { epoll, waker: Arc::new(EventWaker(event)), events };
        poller.watch(&poller.waker.0, Token::Waker, epoll::EventFlags::IN)?;
        Ok(poller)
    }

    fn watch(&self, fd: impl AsFd, token: Token, flags: epoll::EventFlags) -> Result<(), TransportError> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token.encode()), flags)
            .map_err(|errno| TransportError::system("watching a socket", errno))
    }

    /// Watches for connections to accept, for as long as there are any.
    pub(super) fn add_listener(&self, fd: impl AsFd) -> Result<(), TransportError> {
        self.watch(fd, Token::Listener, epoll::EventFlags::IN)
    }

    /// Stops to watch.
    pub(super) fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Watches a connection: one event whenever bytes have come, the end has come, or there is room again.
    pub(super) fn add(&self, fd: impl AsFd, token: Token) -> Result<(), TransportError> {
        self.watch(fd, token, CONNECTION)
    }

    /// Gives a connection another token; what is there already makes an event again.
    pub(super) fn rename(&self, fd: impl AsFd, token: Token) -> Result<(), TransportError> {
        epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token.encode()), CONNECTION)
            .map_err(|errno| TransportError::system("watching a socket", errno))
    }

    /// Sleeps until something happens, at most `timeout`; how many events there are to look at.
    pub(super) fn collect(&mut self, timeout: Duration) -> Result<usize, TransportError> {
        // A timeout that no clock holds is as good as a day.
        let timeout = timeout.min(Duration::from_secs(86_400));
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        let mut events = [MaybeUninit::uninit(); EVENTS];
        let events = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(0),
            Err(errno) => return Err(TransportError::system("waiting for events", errno)),
        };
        let ends = epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        for (slot, &mut epoll::Event { flags, data }) in self.events.iter_mut().zip(&mut *events) {
            *slot = (Token::decode(data.u64()), flags.intersects(ends));
        }
        Ok(events.len())
    }

    /// One of the events that [`Poller::collect`] counted.
    pub(super) fn event(&self, index: usize) -> Event {
        self.events[index]
    }

    /// Takes back the wakes so far.
    pub(super) fn calm(&self) {
        let _ = rustix::io::read(&self.waker.0, &mut [0; 8]);
    }

    /// The waker.
    pub(super) fn waker(&self) -> Arc<EventWaker> {
        self.waker.clone()
    }
}

/// Wakes by an eventfd.
pub(super) struct EventWaker(OwnedFd);

impl Wake for EventWaker {
    fn wake(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_kernel() {
        for token in [Token::Listener, Token::Waker, Token::Greeting(7), Token::Lane(LinkId(u32::MAX), 7)] {
            assert_eq!(Token::decode(token.encode()), token);
        }
        for token in [Token::Linger(1 << 40), Token::Link(LinkId(3))] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
