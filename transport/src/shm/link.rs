//! A link from `open` to `close`.

use super::connection::Connection;
use super::dial::Dial;
use crate::{LinkId, LinkSpec};
use std::time::Instant;

/// One link of an endpoint.
pub(super) struct Link {
    pub(super) id: LinkId,
    pub(super) spec: LinkSpec,
    /// What a hello calls it.
    pub(super) token: u64,
    pub(super) state: State,
    /// Why the last hello for it was turned down; told if no other succeeds.
    pub(super) refusal: Option<&'static str>,
}

/// How far a link has come.
pub(super) enum State {
    /// Not yet connected by this side; perhaps the peer has already proven itself.
    Opened(Option<Box<Connection>>),
    /// Active: the hello is under way.
    Dialling(Box<Dial>),
    /// Passive: the hello is awaited.
    Awaiting(Option<Instant>),
    /// It carries work.
    Connected(Box<Connection>),
    /// Only to be closed.
    Ended,
}

impl Link {
    /// The connection, if the link is connected.
    pub(super) fn connection(&mut self) -> Option<&mut Connection> {
        match &mut self.state {
            State::Connected(connection) => Some(connection),
            _ => None,
        }
    }

    /// When the link must be connected; nothing if it is not being connected.
    pub(super) fn deadline(&self) -> Option<Option<Instant>> {
        match &self.state {
            State::Dialling(dial) => Some(dial.deadline),
            State::Awaiting(deadline) => Some(*deadline),
            _ => None,
        }
    }
}
