//! One link of an endpoint: its lanes as they come to be, what it has granted, and how posted work becomes frames.

use super::frame::{HEADER_BYTES, Header, Opcode, padding};
use super::grants::Grants;
use super::greeting::Dial;
use super::hello::Message;
use super::lane::Lane;
use super::outbox::{Frame, INLINE_BYTES, Payload, QUEUE_DEPTH};
use super::socket::Gather;
use crate::{Disconnect, LinkId, LinkSpec, Op, PostError, Provider, Source, Target, Work};
use std::net::TcpStream;
use std::time::Instant;

/// Works of a chain that may leave without being kept.
const AT_ONCE: usize = 8;
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
        let sent = send_at_once(lane, self.spec.incarnation, chain);
        if sent == Sent::Whole {
            return Ok(true);
        }
        for work in chain {
            let sequence = lane.outbox.next_sequence();
            let header = header_of(self.spec.incarnation, sequence, lane.outbox.executed(), work);
            let (payload, target) = match &work.op {
                Op::Write { source, .. } | Op::WriteImmediate { source, .. } => (payload(source), None),
                Op::Read { target: Target { region, offset, len }, .. }
                | Op::FetchAdd { target: Target { region, offset, len }, .. } => {
                    (Payload::Nothing, Some(((*region).clone(), *offset..*offset + *len)))
                }
            };
            lane.outbox.post(Frame::new(&header, payload), work.signal, target);
        }
        if let Sent::Part(bytes) = sent {
            lane.outbox.has_sent(bytes);
        }
        lane.outbox.flush(&lane.socket);
        Ok(!chain.is_empty())
    }
}

/// What has left of a chain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    Nothing,
    Part(usize),
    Whole,
}

/// Sends a chain without keeping it, if nothing is in front of it, and nothing of it has to be remembered once it has left.
fn send_at_once(lane: &mut Lane, incarnation: u32, chain: &[Work<'_>]) -> Sent {
    let is_plain =
        |work: &Work<'_>| work.signal.is_none() && matches!(work.op, Op::Write { .. } | Op::WriteImmediate { .. });
    if !lane.outbox.is_empty() || !(1..=AT_ONCE).contains(&chain.len()) || !chain.iter().all(is_plain) {
        return Sent::Nothing;
    }
    let (first, executed) = (lane.outbox.next_sequence(), lane.outbox.executed());
    let mut headers = [[0; HEADER_BYTES]; AT_ONCE];
    for ((header, work), sequence) in headers.iter_mut().zip(chain).zip(first..) {
        *header = header_of(incarnation, sequence, executed, work).encode();
    }
    let (mut gather, mut bytes) = (Gather::new(usize::MAX), 0);
    for (header, work) in headers.iter().zip(chain) {
        gather.slice(header);
        bytes += HEADER_BYTES;
        if let Op::Write { source, .. } | Op::WriteImmediate { source, .. } = &work.op {
            let padding = padding(source.len());
            gather.slice(padding);
            bytes += padding.len();
            match *source {
                Source::Inline(payload) => gather.slice(payload),
                Source::Region(region, start, len) => gather.region(region, start..start + len),
            }
            bytes += source.len();
        }
    }
    match gather.send(&lane.socket) {
        Ok(sent) if sent == bytes => {
            lane.outbox.pass(chain.len());
            Sent::Whole
        }
        Ok(sent) => Sent::Part(sent),
        // What is broken is found out by the next turn.
        Err(_) => Sent::Nothing,
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

/// The header of a checked work.
fn header_of(incarnation: u32, sequence: u64, acknowledged: u64, work: &Work<'_>) -> Header {
    let (opcode, remote, len, immediate) = match &work.op {
        Op::Write { source, remote } => (Opcode::Write, Some(remote), source.len(), 0),
        Op::WriteImmediate { source, remote, immediate } => {
            (Opcode::WriteImmediate, remote.as_ref(), source.len(), *immediate)
        }
        // A fetch-add was refused before.
        Op::Read { remote, target } | Op::FetchAdd { remote, target, .. } => {
            (Opcode::ReadRequest, Some(remote), target.len, 0)
        }
    };
    let (key, offset) = remote.map_or((0, 0), |remote| (remote.region.key, remote.offset));
    let signalled = work.signal.is_some();
    let plain = Header::plain(opcode, incarnation);
    Header { key, offset, len: len as u64, immediate, signalled, sequence, acknowledged, ..plain }
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
