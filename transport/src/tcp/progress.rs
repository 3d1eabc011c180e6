//! What the network brings to an endpoint: turns for its sockets, links that come to be and end, deadlines.

use super::endpoint::TcpEndpoint;
use super::frame::{Header, Opcode};
use super::greeting::{self, Greeting, Progress};
use super::hello::{Rejection, Transcript};
use super::lane::{Fault, Lane};
use super::linger::Linger;
use super::link::{Link, Phase, Seat};
use super::outbox::{Fate, Flow};
use super::poller::Token;
use super::socket;
use crate::{Completion, Disconnect, LinkId, LinkSecret, Side, WorkError};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

/// Completions that one poll appends, about.
const COMPLETIONS_PER_POLL: usize = 256;
/// Connections that one poll accepts.
const ACCEPTS_PER_POLL: usize = 16;
/// Connections that may be unproven at a time; beyond, the oldest goes.
const MAX_GREETINGS: usize = 256;
/// How long to accept nobody after the system has run out of something.
const DEAF_FOR: Duration = Duration::from_millis(100);

impl TcpEndpoint {
    /// Gives everybody who waits for a turn one.
    pub(super) fn progress(&mut self, completions: &mut Vec<Completion>) {
        let limit = completions.len() + COMPLETIONS_PER_POLL;
        if self.knock {
            self.knock = false;
            self.accept();
        }
        if let Some(deadline) = self.deadline
            && Instant::now() >= deadline
        {
            self.expire(completions);
        }
        for _ in 0..self.turns.len() {
            if completions.len() >= limit {
                return;
            }
            match self.turns.pop_front() {
                Some(Token::Lane(link, lane)) => self.serve(link, lane, completions, limit),
                Some(Token::Greeting(id)) => self.advance_greeting(id),
                Some(Token::Linger(id)) => self.advance_linger(id),
                Some(Token::Link(link)) => self.settle(link, completions),
                Some(Token::Listener | Token::Waker) | None => {}
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_POLL {
            let (socket, peer) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => continue,
                Err(_) => {
                    // Out of files or memory: the listener would go on knocking.
                    self.poller.remove(&self.listener);
                    let until = Instant::now() + DEAF_FOR;
                    self.deaf_until = Some(until);
                    self.remind(until);
                    return;
                }
            };
            let id = self.new_id();
            let ready = socket.set_nonblocking(true).and_then(|()| socket::tune(&socket, peer.ip()));
            if ready.is_err() || self.poller.add(&socket, Token::Greeting(id)).is_err() {
                continue;
            }
            if self.greetings.len() == MAX_GREETINGS {
                self.greetings.pop_first();
            }
            let now = Instant::now();
            let deadline = now.checked_add(self.hello_timeout).unwrap_or(now);
            self.remind(deadline);
            self.greetings.insert(id, Greeting::new(socket, deadline));
            self.turns.push_back(Token::Greeting(id));
        }
    }

    fn advance_greeting(&mut self, id: u64) {
        let Some(greeting) = self.greetings.get_mut(&id) else { return };
        let links = &self.links;
        match greeting.advance(|talk| find(links, talk)) {
            Progress::Waiting => {}
            Progress::Dropped(claimed) => {
                self.greetings.remove(&id);
                if let Some(link) = claimed.and_then(|link| self.links.get_mut(&link)) {
                    link.mistrusted = true;
                }
            }
            Progress::Proven(link_id, lane, welcome) => {
                let Some(Greeting { socket, .. }) = self.greetings.remove(&id) else { return };
                let Some(link) = self.links.get_mut(&link_id) else { return };
                if self.poller.rename(&socket, Token::Lane(link_id, lane)).is_ok() {
                    link.seats[usize::from(lane)] = Seat::Proven(socket, welcome);
                    self.turns.push_back(Token::Link(link_id));
                }
            }
        }
    }

    pub(super) fn advance_linger(&mut self, id: u64) {
        match self.lingering.get_mut(&id).map(Linger::advance) {
            Some(Flow::Idle) => drop(self.lingering.remove(&id)),
            Some(Flow::More) => self.turns.push_back(Token::Linger(id)),
            Some(Flow::Blocked) | None => {}
        }
    }

    /// Gives a lane its turn.
    fn serve(&mut self, id: LinkId, lane: u8, completions: &mut Vec<Completion>, limit: usize) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.queued &= !(1 << lane);
        let hangup = link.hangup & (1 << lane) != 0;
        let Some(seat) = link.seats.get_mut(usize::from(lane)) else { return };
        let fault = match seat {
            Seat::Vacant | Seat::Welcomed(_) => return,
            Seat::Proven(socket, _) => {
                // A dialler says nothing before it is welcomed: whatever comes, it has gone or talks out of turn.
                let result = socket::receive(socket, None, &mut [0]);
                if !matches!(result, Err(error) if error.kind() == ErrorKind::WouldBlock) {
                    *seat = Seat::Vacant;
                }
                return;
            }
            Seat::Dialling(dial) => match dial.advance(&link.spec.secret) {
                Ok(false) => return,
                Ok(true) => {
                    if let Seat::Dialling(dial) = std::mem::replace(seat, Seat::Vacant) {
                        *seat = Seat::Welcomed(dial.socket);
                    }
                    return self.settle(id, completions);
                }
                Err(reason) => Fault::Ended(reason),
            },
            Seat::Open(open) => {
                let served = open.serve(&link.grants, hangup, completions, limit);
                let moved = open.take_moved();
                if moved {
                    self.idle_since = None;
                }
                if !self.lively.note(id, lane, moved) {
                    open.set_apart(&self.poller, false);
                }
                match served {
                    Ok(true) => return self.queue_lane(id, lane, false),
                    Ok(false) if link.all_said_bye() => Fault::Ended(Disconnect::Closed),
                    Ok(false) => return,
                    Err(fault) => fault,
                }
            }
        };
        self.fail(id, lane, fault, completions);
    }

    /// Ends a link for what happened on one of its lanes.
    fn fail(&mut self, id: LinkId, lane: u8, fault: Fault, completions: &mut Vec<Completion>) {
        let Some(link) = self.links.get(&id) else { return };
        match fault {
            Fault::Ended(reason) => self.end(id, reason, None, None, completions),
            Fault::Refuse(sequence, why) => {
                let plain = Header::plain(Opcode::Refused, link.spec.incarnation);
                let farewell = Header { lane, sequence, immediate: why as u32, ..plain };
                let reason = Disconnect::AccessRefused(format!("refused the peer's work: {why}"));
                self.end(id, reason, None, Some(farewell), completions);
            }
            Fault::Refused { lane, sequence, why } => {
                let reason = Disconnect::AccessRefused(format!("the peer refused work on lane {lane}: {why}"));
                self.end(id, reason, Some((lane, sequence)), None, completions);
            }
        }
    }

    /// Ends a link: its sockets first, then its work, then itself. With `farewell`, each lane still says that.
    fn end(
        &mut self,
        id: LinkId,
        reason: Disconnect,
        refused: Option<(u8, u64)>,
        farewell: Option<Header>,
        completions: &mut Vec<Completion>,
    ) {
        let Some(link) = self.links.get_mut(&id).filter(|link| link.phase != Phase::Ended) else { return };
        link.phase = Phase::Ended;
        link.grants.clear();
        self.lively.forget(id);
        for (lane, seat) in (0..).zip(std::mem::take(&mut link.seats)) {
            let Seat::Open(mut open) = seat else { continue };
            open.set_apart(&self.poller, false);
            let refused = refused.and_then(|(bad, sequence)| (bad == lane).then_some(sequence));
            open.outbox.abandon(refused, |signal, fate| {
                let (token, result) = match (fate, signal) {
                    (Fate::Done, Some(token)) => (token, Ok(())),
                    (Fate::Flushed, Some(token)) => (token, Err(WorkError::Flushed)),
                    (Fate::Refused, token) => (token.unwrap_or(u64::MAX), Err(WorkError::RemoteAccess)),
                    (_, None) => return,
                };
                completions.push(Completion::Sent { link: id, lane, token, result });
            });
            if let Some(farewell) = farewell {
                let (socket, rest) = open.part(false, farewell);
                self.linger(Linger::new(socket, rest));
            }
        }
        completions.push(Completion::Disconnected { link: id, reason });
    }

    /// Connects a link whose lanes are all proven, or ends one that cannot be.
    fn settle(&mut self, id: LinkId, completions: &mut Vec<Completion>) {
        let Some(link) = self.links.get_mut(&id) else { return };
        if let Some(reason) = link.verdict.take() {
            return self.end(id, reason, None, None, completions);
        }
        if !matches!(link.phase, Phase::Connecting { .. }) || !link.is_proven() {
            return;
        }
        for (lane, seat) in (0..).zip(&mut link.seats) {
            *seat = match std::mem::replace(seat, Seat::Vacant) {
                Seat::Welcomed(socket) => Seat::Open(Lane::new(socket, id, lane, link.spec.incarnation)),
                Seat::Proven(socket, welcome) => {
                    // If it cannot be sent the connection is broken, and the lane will find that out.
                    let _ = greeting::send(&socket, &welcome);
                    Seat::Open(Lane::new(socket, id, lane, link.spec.incarnation))
                }
                other => other,
            };
        }
        link.phase = Phase::Connected;
        let lanes = link.spec.lanes;
        completions.push(Completion::Connected { link: id });
        for lane in 0..lanes {
            self.queue_lane(id, lane, false);
        }
    }

    /// Does what is due.
    fn expire(&mut self, completions: &mut Vec<Completion>) {
        let now = Instant::now();
        self.greetings.retain(|_, greeting| greeting.deadline > now);
        self.lingering.retain(|_, linger| linger.deadline > now);
        if self.deaf_until.is_some_and(|until| until <= now) {
            let heard = self.poller.add_listener(&self.listener).is_ok();
            self.deaf_until = (!heard).then_some(now + DEAF_FOR);
        }
        let late = |link: &Link| matches!(link.phase, Phase::Connecting { deadline } if deadline <= now);
        while let Some(link) = self.links.values().find(|link| late(link)) {
            let reason = match link.spec.side {
                _ if link.mistrusted => Disconnect::Rejected(Rejection::Secret.to_string()),
                Side::Active => Disconnect::NotConnected("the peer did not answer in time".into()),
                Side::Passive => Disconnect::NotConnected("the peer did not dial in time".into()),
            };
            self.end(link.id, reason, None, None, completions);
        }
        let links = self.links.values().filter_map(|link| match link.phase {
            Phase::Connecting { deadline } => Some(deadline),
            _ => None,
        });
        let greetings = self.greetings.values().map(|greeting| greeting.deadline);
        let lingering = self.lingering.values().map(|linger| linger.deadline);
        self.deadline = links.chain(greetings).chain(lingering).chain(self.deaf_until).min();
    }
}

/// The link that a dialler may claim.
fn find(links: &BTreeMap<LinkId, Link>, talk: &Transcript) -> Result<(LinkId, LinkSecret), Rejection> {
    let claimed = |link: &&Link| link.spec.incarnation == talk.incarnation && link.spec.side == Side::Passive;
    let link = links.values().find(claimed).filter(|link| link.awaits_diallers()).ok_or(Rejection::Incarnation)?;
    if link.spec.lanes != talk.lanes {
        return Err(Rejection::Lane);
    }
    match link.seats.get(usize::from(talk.lane)) {
        Some(Seat::Vacant) => Ok((link.id, link.spec.secret)),
        _ => Err(Rejection::Lane),
    }
}
