//! One link of an endpoint: its lanes as they come to be, what it has granted, and how posted work becomes frames.

use super::frame::{Header, Opcode};
use super::grants::Grants;
use super::greeting::Dial;
use super::hello::Message;
use super::lane::Lane;
use super::outbox::{Frame, INLINE_BYTES, Payload, QUEUE_DEPTH, ReadTarget};
use crate::{Disconnect, LinkId, LinkSpec, Op, PostError, Provider, Remote, Source, Work};
use std::net::TcpStream;
use std::time::Instant;

const NO_FETCH_ADD: PostError = PostError::Unsupported { provider: Provider::Tcp, what: "fetch-add" };

/// Where a lane is on its way to be used.
#[derive(Debug)]
pub(super) enum Seat {
    Vacant,
    /// This side dials.
    Dialling(Dial),
    /// The listener has welcomed this side; the other lanes have not all got so far.
    Welcomed(TcpStream),
    /// The dialler has proven itself; it is welcomed when all lanes have and this side wants to connect.
    Proven(TcpStream, Message),
    Open(Lane),
}

/// Where a link is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Opened,
    Connecting { deadline: Instant },
    Connected,
    Ended,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: LinkId,
    pub(super) spec: LinkSpec,
    pub(super) phase: Phase,
    pub(super) seats: Vec<Seat>,
    pub(super) grants: Grants,
    /// The lanes that wait for their turn, and those whose stream is known to end; a bit each.
    pub(super) queued: u8,
    pub(super) hangup: u8,
    /// Why the link is to end at its next turn.
    pub(super) verdict: Option<Disconnect>,
    /// Somebody claimed this link and could not prove the secret.
    pub(super) mistrusted: bool,
}

impl Link {
    /// A link with its lanes still vacant.
    pub(super) fn new(id: LinkId, spec: LinkSpec) -> Self {
        Self {
            id,
            spec,
            phase: Phase::Opened,
            seats: (0..spec.lanes).map(|_| Seat::Vacant).collect(),
            grants: Grants::new(spec.incarnation),
            queued: 0,
            hangup: 0,
            verdict: None,
            mistrusted: false,
        }
    }

    /// Whether a connection may still claim one of its lanes.
    pub(super) fn awaits_diallers(&self) -> bool {
        matches!(self.phase, Phase::Opened | Phase::Connecting { .. })
    }

    /// Whether every lane is proven.
    pub(super) fn is_proven(&self) -> bool {
        self.seats.iter().all(|seat| matches!(seat, Seat::Welcomed(_) | Seat::Proven(..)))
    }

    /// Whether the peer has closed every lane in good order.
    pub(super) fn all_said_bye(&self) -> bool {
        self.seats.iter().all(|seat| matches!(seat, Seat::Open(lane) if lane.said_bye()))
    }

    /// Posts a chain to a lane, and sends what can be sent at once; says whether the lane wants a turn.
    pub(super) fn post(&mut self, lane: u8, chain: &[Work<'_>]) -> Result<bool, PostError> {
        if self.phase != Phase::Connected || self.verdict.is_some() {
            return Err(PostError::NotConnected(self.id));
        }
        let Some(Seat::Open(lane)) = self.seats.get_mut(usize::from(lane)) else {
            return Err(PostError::Invalid(format!("lane {lane} of a link that has {}", self.spec.lanes)));
        };
        if chain.len() > QUEUE_DEPTH {
            return Err(PostError::Invalid(format!("a chain of {} on lanes of {QUEUE_DEPTH}", chain.len())));
        }
        for work in chain {
            check(self.id, &work.op)?;
        }
        if chain.len() > lane.outbox.room() {
            return Err(PostError::WouldBlock);
        }
        for work in chain {
            let sequence = lane.outbox.next_sequence();
            let signalled = work.signal.is_some();
            let plain = Header { sequence, signalled, ..Header::plain(Opcode::Write, self.spec.incarnation) };
            let (frame, target) = translate(plain, &work.op)?;
            lane.outbox.post(frame, work.signal, target);
        }
        lane.outbox.flush(&lane.socket);
        Ok(!chain.is_empty())
    }
}

/// Refuses what cannot be, whatever the peer has granted.
fn check(link: LinkId, op: &Op<'_>) -> Result<(), PostError> {
    let invalid = |what: String| Err(PostError::Invalid(what));
    let (source, remote) = match op {
        Op::Write { source, remote } => (*source, Some(remote)),
        Op::WriteImmediate { source, remote, .. } => (*source, remote.as_ref()),
        Op::Read { remote, target } => {
            if !target.region.writable() {
                return invalid("the target of a read is mapped read-only here".into());
            }
            (Source::Region(target.region, target.offset, target.len), Some(remote))
        }
        Op::FetchAdd { .. } => return Err(NO_FETCH_ADD),
    };
    match (source, remote) {
        (Source::Inline(bytes), _) if bytes.len() > INLINE_BYTES => {
            return invalid(format!("{} inline bytes, of {INLINE_BYTES} at most", bytes.len()));
        }
        (_, None) if !source.is_empty() => return invalid("bytes to write, and no place to write them to".into()),
        _ => {}
    }
    if let Source::Region(region, start, len) = source {
        region.check_local(Provider::Tcp, start, len)?;
    }
    match remote {
        Some(remote) if remote.region.link != link => {
            invalid(format!("a region of {:?} in work for {link:?}", remote.region.link))
        }
        _ => Ok(()),
    }
}

/// The frame for a checked operation, and where a read's bytes go.
fn translate(plain: Header, op: &Op<'_>) -> Result<(Frame, Option<ReadTarget>), PostError> {
    let place = |remote: Option<&Remote<'_>>| remote.map_or((0, 0), |remote| (remote.region.key, remote.offset));
    Ok(match op {
        Op::Write { source, remote } => {
            let (key, offset) = place(Some(remote));
            let header = Header { opcode: Opcode::Write, key, offset, len: source.len() as u64, ..plain };
            (Frame::new(&header, payload(source)), None)
        }
        Op::WriteImmediate { source, remote, immediate } => {
            let (key, offset) = place(remote.as_ref());
            let (opcode, len, immediate) = (Opcode::WriteImmediate, source.len() as u64, *immediate);
            (Frame::new(&Header { opcode, key, offset, len, immediate, ..plain }, payload(source)), None)
        }
        Op::Read { remote, target } => {
            let (key, offset) = place(Some(remote));
            let header = Header { opcode: Opcode::ReadRequest, key, offset, len: target.len as u64, ..plain };
            let target = (target.region.clone(), target.offset..target.offset + target.len);
            (Frame::new(&header, Payload::Nothing), Some(target))
        }
        Op::FetchAdd { .. } => return Err(NO_FETCH_ADD),
    })
}

fn payload(source: &Source<'_>) -> Payload {
    match *source {
        _ if source.is_empty() => Payload::Nothing,
        Source::Inline(bytes) => {
            let mut copy = [0; INLINE_BYTES];
            copy[..bytes.len()].copy_from_slice(bytes);
            Payload::Inline(copy, bytes.len())
        }
        Source::Region(region, start, len) => Payload::Region(region.clone(), start..start + len),
    }
}
