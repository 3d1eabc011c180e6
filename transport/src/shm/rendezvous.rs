//! The passive side of a hello: connections are accepted, challenged, and either become a link's or are dropped.
//!
//! A connection belongs to nobody until it has proven a link's secret. Whatever an unproven one says or fails to say,
//! it is dropped, and the link it named goes on waiting for the right one.

use super::connection::Connection;
use super::doorbell::Doorbell;
use super::endpoint::ShmEndpoint;
use super::hello::Transcript;
use super::link::State;
use super::rings::Rings;
use super::socket::{Received, Socket, random};
use super::watch::Source;
use super::wire::{Packet, Reject};
use crate::{Completion, Disconnect, LinkId, Side, TransportError};
use std::os::fd::OwnedFd;
use std::time::Instant;

/// Unproven connections that are held, on top of one for each link that may still be dialled.
const MAX_STRANGERS: usize = 64;

/// A connection that has not proven itself.
pub(super) struct Candidate {
    number: u32,
    socket: Socket,
    deadline: Option<Instant>,
    /// What it was challenged with.
    challenged: Option<(LinkId, Transcript)>,
}

/// What is to become of a candidate.
enum Verdict {
    /// It has its time.
    Keep,
    /// It is told why, or is not worth a word.
    Drop(Option<Reject>),
    /// It has proven to be the peer of a link.
    Adopt(LinkId, Vec<OwnedFd>),
}

impl ShmEndpoint {
    /// Takes in new connections.
    pub(super) fn accept(&mut self) -> Result<(), TransportError> {
        // Not all at once: the links in use want their turn.
        for _ in 0..MAX_STRANGERS {
            let Some(listener) = &self.listener else { break };
            match listener.accept() {
                Ok(Some(socket)) => {
                    let number = self.next_candidate;
                    self.next_candidate = number.wrapping_add(1);
                    self.watch.add(&socket, Source::Candidate(number))?;
                    let deadline = Instant::now().checked_add(self.options.hello_timeout);
                    self.candidates.push(Candidate { number, socket, deadline, challenged: None });
                    self.hear(number)?;
                }
                Ok(None) => break,
                // Out of descriptors, say: try again a little later, rather than at every look.
                Err(errno) => {
                    tracing::warn!(%errno, "shm cannot accept a connection");
                    self.watch.mute(listener, Source::Listener)?;
                    self.deaf = true;
                    break;
                }
            }
        }
        let wanted = self.links.iter().filter(|link| matches!(link.state, State::Opened(None) | State::Awaiting(_)));
        let limit = MAX_STRANGERS + wanted.count();
        let excess = self.candidates.len().saturating_sub(limit);
        self.candidates.drain(..excess);
        Ok(())
    }

    /// Drops the connections that have said nothing useful in time.
    pub(super) fn expire_candidates(&mut self, now: Instant) {
        self.candidates.retain(|candidate| candidate.deadline.is_none_or(|deadline| now < deadline));
    }

    /// Hears what a candidate has to say.
    pub(super) fn hear(&mut self, number: u32) -> Result<(), TransportError> {
        let Some(index) = self.candidates.iter().position(|candidate| candidate.number == number) else {
            return Ok(());
        };
        match self.judge(index)? {
            Verdict::Keep => {}
            Verdict::Drop(why) => {
                let candidate = self.candidates.remove(index);
                if let Some(why) = why {
                    let _ = candidate.socket.send(&Packet::Reject(why).encode(), &[]);
                }
            }
            Verdict::Adopt(id, fds) => {
                let socket = self.candidates.remove(index).socket;
                self.adopt(id, socket, fds)?;
            }
        }
        Ok(())
    }

    /// Looks at one packet of a candidate.
    fn judge(&mut self, index: usize) -> Result<Verdict, TransportError> {
        let candidate = &mut self.candidates[index];
        let (bytes, fds) = match candidate.socket.receive() {
            Ok(Received::Nothing) => return Ok(Verdict::Keep),
            Ok(Received::HungUp) | Err(_) => return Ok(Verdict::Drop(None)),
            Ok(Received::Packet(bytes, fds)) => (bytes, fds),
        };
        let wanted = |state: &State| matches!(state, State::Opened(None) | State::Awaiting(_));
        match (Packet::decode(&bytes), candidate.challenged) {
            (Ok(Packet::Hello { token, incarnation, lanes, nonce }), None) => {
                let named = |link: &&mut super::link::Link| {
                    link.spec.side == Side::Passive && link.token == token && wanted(&link.state)
                };
                let Some(link) = self.links.iter_mut().find(named) else {
                    return Ok(Verdict::Drop(Some(Reject::NoSuchLink)));
                };
                for (differs, why) in [
                    (link.spec.incarnation != incarnation, Reject::Incarnation),
                    (link.spec.lanes != lanes, Reject::Lanes),
                ] {
                    if differs {
                        link.refusal = Some(why.why());
                        return Ok(Verdict::Drop(Some(why)));
                    }
                }
                let mut passive_nonce = [0; 16];
                random(&mut passive_nonce)?;
                let transcript = Transcript { token, incarnation, lanes, active_nonce: nonce, passive_nonce };
                let proof = transcript.prove(&link.spec.secret, Side::Passive);
                let challenge = Packet::Challenge { nonce: passive_nonce, proof };
                candidate.challenged = Some((link.id, transcript));
                Ok(match candidate.socket.send(&challenge.encode(), &[]) {
                    Ok(()) => Verdict::Keep,
                    Err(_) => Verdict::Drop(None),
                })
            }
            (Ok(Packet::Proof { proof }), Some((id, transcript))) => {
                let Some(link) = self.links.iter_mut().find(|link| link.id == id && wanted(&link.state)) else {
                    return Ok(Verdict::Drop(Some(Reject::NoSuchLink)));
                };
                if transcript.verify(&link.spec.secret, Side::Active, &proof) {
                    return Ok(Verdict::Adopt(id, fds));
                }
                link.refusal = Some(Reject::Proof.why());
                Ok(Verdict::Drop(Some(Reject::Proof)))
            }
            _ => Ok(Verdict::Drop(None)),
        }
    }

    /// Makes a proven connection the link's, if what it brought is as it should be.
    fn adopt(&mut self, id: LinkId, socket: Socket, fds: Vec<OwnedFd>) -> Result<(), TransportError> {
        let Some(index) = self.position(id) else { return Ok(()) };
        let lanes = self.links[index].spec.lanes;
        let brought = match fds.as_slice() {
            [bell, rings] => Doorbell::adopt(bell).and_then(|bell| Ok((bell, Rings::adopt(rings, lanes)?))),
            _ => Err("a proof without a doorbell and rings".into()),
        };
        match brought {
            Ok((bell, rings)) => {
                self.watch.rename(&socket, Source::Link(id))?;
                let connection = Connection::new(socket, rings, bell);
                match self.links[index].state {
                    State::Awaiting(_) => self.welcome(index, connection),
                    _ => self.links[index].state = State::Opened(Some(connection)),
                }
            }
            Err(what) => {
                let _ = socket.send(&Packet::Reject(Reject::Memory).encode(), &[]);
                match self.links[index].state {
                    State::Awaiting(_) => self.fail(index, Disconnect::Rejected(what)),
                    _ => self.links[index].refusal = Some(Reject::Memory.why()),
                }
            }
        }
        Ok(())
    }

    /// Tells a proven peer that the link is up.
    pub(super) fn welcome(&mut self, index: usize, connection: Box<Connection>) {
        let sent = connection.socket().map(|socket| socket.send(&Packet::Welcome.encode(), &[self.bell.fd()]));
        match sent {
            Some(Ok(())) => {
                connection.bell.ring();
                self.links[index].state = State::Connected(connection);
                let link = self.links[index].id;
                self.ready.push_back(Completion::Connected { link });
            }
            _ => self.fail(index, Disconnect::NotConnected("the peer hung up during the hello".into())),
        }
    }
}
