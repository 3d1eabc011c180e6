//! Connecting by the connection manager (librdmacm), for fabrics on which a queue pair's number and its port's address
//! do not suffice. It finds addresses and routes and lets the two ends agree on a queue pair's attributes; queue pairs
//! are made, moved and used as ever.
//!
//! Each queue pair of a link has a connection. The passive end's descriptor says at which addresses it listens, one for
//! each rail; the active end dials, and both prove that they know the link secret (`message`). Without the proof a
//! request is refused before the link hears of it. When all connections are made the active end greets on the control
//! queue pair.
//!
//! ```text
//!   active   resolve address ─ resolve route ─ request ───▶            ◀─── answer ─ confirm ─ (all) hello
//!   passive  listen                                       prove, accept                              welcome
//! ```

mod address;
mod channel;
mod establish;
mod identifier;
mod library;
mod message;
mod sys;

pub(super) use establish::PERIOD;
pub(super) use identifier::{Identifier, Offer};

use super::context::Context;
use super::descriptor::NONCE_BYTES;
use crate::{LinkId, TransportError};
use channel::Channel;
use message::Request;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Requests that may wait at a listener.
const BACKLOG: i32 = 1024;

/// An endpoint's part of it. Fields drop in this order; its links' connections must be gone before.
pub(super) struct ConnectionManager {
    listeners: Vec<Identifier>,
    /// Of each rail; with a port once it listens.
    addresses: Vec<SocketAddr>,
    channel: Channel,
    /// There were events when it was last looked for them.
    called: bool,
}

impl ConnectionManager {
    /// For an endpoint on these rails.
    pub(super) fn new(rails: &[Arc<Context>]) -> Result<Self, TransportError> {
        let channel = Channel::new()?;
        let address = |rail: &Arc<Context>| Ok(SocketAddr::new(address::of_rail(&channel, rail)?, 0));
        let addresses = rails.iter().map(address).collect::<Result<_, TransportError>>()?;
        Ok(Self { listeners: Vec::new(), addresses, channel, called: false })
    }

    /// Listens on all rails, if it does not already.
    pub(super) fn listen(&mut self) -> Result<(), TransportError> {
        for rail in self.listeners.len()..self.addresses.len() {
            let listener = Identifier::new(&self.channel, About::Listener(rail).encode())?;
            listener.bind(self.addresses[rail])?;
            self.addresses[rail].set_port(listener.listen(BACKLOG)?);
            self.listeners.push(listener);
        }
        Ok(())
    }

    /// Where the rails are, in their order; with a port once they listen.
    pub(super) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What is readable while there are events.
    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        self.channel.event_fd()
    }

    /// Whether there are events, which are then to be taken.
    pub(super) fn listen_up(&mut self) -> bool {
        self.called |= self.channel.is_readable();
        self.called
    }
}

/// What an identifier's events are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum About {
    /// A rail's listener.
    Listener(usize),
    /// A connection of a link: 0 is the control queue pair's, and from 1 the lanes'.
    Connection(LinkId, u8),
}

impl About {
    const LISTENER: u64 = 1 << 63;

    fn encode(self) -> u64 {
        match self {
            Self::Listener(rail) => Self::LISTENER | rail as u64,
            Self::Connection(link, number) => u64::from(link.0) << 8 | u64::from(number),
        }
    }

    fn decode(about: u64) -> Self {
        match about & Self::LISTENER {
            0 => Self::Connection(LinkId((about >> 8) as u32), about as u8),
            _ => Self::Listener((about ^ Self::LISTENER) as usize),
        }
    }
}

/// The connections of a link's queue pairs.
pub(super) struct Connections {
    /// The random number of this half, part of all proofs.
    pub(super) nonce: [u8; NONCE_BYTES],
    /// The control queue pair's first.
    each: Vec<Connection>,
}

enum Connection {
    /// Nobody has asked.
    None,
    /// This end asks.
    Dialled(Identifier),
    /// The peer has asked, and proven that it may. It is answered when this end connects.
    Asked(Identifier, Request, Offer),
    Made {
        _identifier: Identifier,
    },
}

impl Connections {
    /// For a link with so many lanes.
    pub(super) fn new(lanes: u8) -> Result<Self, TransportError> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|error| TransportError::invalid(format!("no random number: {error}")))?;
        Ok(Self { nonce, each: (0..=lanes).map(|_| Connection::None).collect() })
    }

    fn take(&mut self, number: u8) -> Connection {
        self.each
            .get_mut(usize::from(number))
            .map_or(Connection::None, |each| std::mem::replace(each, Connection::None))
    }

    fn put(&mut self, number: u8, connection: Connection) {
        if let Some(each) = self.each.get_mut(usize::from(number)) {
            *each = connection;
        }
    }

    fn is_free(&self, number: u8) -> bool {
        matches!(self.each.get(usize::from(number)), Some(Connection::None))
    }

    fn are_made(&self) -> bool {
        self.each.iter().all(|each| matches!(each, Connection::Made { .. }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_event_is_about_survives_the_library() {
        let links = [0, 1, u32::MAX].map(LinkId);
        let connections = links.into_iter().flat_map(|link| [0, 1, 8].map(|number| About::Connection(link, number)));
        for about in connections.chain([0, 7].map(About::Listener)) {
            assert_eq!(About::decode(about.encode()), about);
        }
    }
}
