//! One lane of a connected link: a socket, what it has to send and what it receives; the frames' meaning.

use super::frame::{Header, Opcode, Refusal};
use super::grants::Grants;
use super::inbox::{Arrival, Inbox, Then};
use super::outbox::{Flow, Frame, Outbox, Payload, Rest};
use super::poller::{Poller, Token};
use crate::{Access, Completion, Disconnect, LinkId};
use std::io;
use std::net::TcpStream;

/// Frames and bytes that one lane takes before others have their turn.
const FRAMES_PER_TURN: usize = 64;
const BYTES_PER_TURN: usize = 1 << 18;

/// See the module.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) socket: TcpStream,
    pub(super) outbox: Outbox,
    inbox: Inbox,
    link: LinkId,
    index: u8,
    /// The peer has closed the lane in good order.
    said_bye: bool,
    /// Bytes have come since [`Lane::take_moved`].
    received: bool,
    /// The kernel makes no events for it: it is tried instead.
    apart: bool,
}

/// What ends a link.
#[derive(Debug)]
pub(super) enum Fault {
    /// The peer is gone, or broke the protocol.
    Ended(Disconnect),
    /// The peer's work of this sequence asked for what was not granted.
    Refuse(u64, Refusal),
    /// The peer refused this side's work.
    Refused { lane: u8, sequence: u64, why: Refusal },
}

fn protocol(what: impl ToString) -> Fault {
    Fault::Ended(Disconnect::Protocol(what.to_string()))
}

impl Lane {
    /// A lane over a proven connection.
    pub(super) fn new(socket: TcpStream, link: LinkId, index: u8, incarnation: u32) -> Self {
        Self {
            socket,
            outbox: Outbox::new(incarnation),
            inbox: Inbox::new(),
            link,
            index,
            said_bye: false,
            received: false,
            apart: false,
        }
    }

    /// Lets the kernel make no events for it, or again; what came meanwhile makes one then.
    pub(super) fn set_apart(&mut self, poller: &Poller, apart: bool) {
        if self.apart == apart {
            return;
        }
        if apart {
            poller.remove(&self.socket);
            self.apart = true;
        } else {
            self.apart = poller.add(&self.socket, Token::Lane(self.link, self.index)).is_err();
        }
    }

    /// Whether bytes have come or gone since the last time.
    pub(super) fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.received) | self.outbox.take_sent()
    }

    /// Whether the peer has closed it in good order.
    pub(super) fn said_bye(&self) -> bool {
        self.said_bye
    }

    /// Gives the lane a turn, until `completions` has `limit` entries; says whether it wants another at once. `hangup`:
    /// the stream is known to end.
    pub(super) fn serve(
        &mut self,
        grants: &Grants,
        hangup: bool,
        completions: &mut Vec<Completion>,
        limit: usize,
    ) -> Result<bool, Fault> {
        self.outbox.tell_news();
        let received = self.receive(grants, hangup, completions, limit)?;
        let sent = self.outbox.flush(&self.socket);
        while completions.len() < limit
            && let Some(signal) = self.outbox.reap()
        {
            if let Some(token) = signal {
                completions.push(Completion::Sent { link: self.link, lane: self.index, token, result: Ok(()) });
            }
        }
        Ok(received == Flow::More || sent == Flow::More || self.outbox.owes_news() || self.outbox.is_ripe())
    }

    fn receive(
        &mut self,
        grants: &Grants,
        hangup: bool,
        completions: &mut Vec<Completion>,
        limit: usize,
    ) -> Result<Flow, Fault> {
        let (mut frames, mut bytes, mut drained) = (0, 0, false);
        while !self.said_bye {
            if frames == FRAMES_PER_TURN || bytes >= BYTES_PER_TURN || completions.len() >= limit {
                return Ok(Flow::More);
            }
            match self.inbox.next().map_err(protocol)? {
                Arrival::Header(header) => {
                    frames += 1;
                    self.take(header, grants, completions)?;
                }
                Arrival::Body(then) => self.finish(then, completions),
                Arrival::Starved if drained => return Ok(Flow::Blocked),
                Arrival::Starved => match self.inbox.fill(&self.socket, BYTES_PER_TURN - bytes) {
                    Ok((0, _)) => return Err(self.gone("its connection was closed")),
                    Ok((count, more)) => {
                        self.received = true;
                        self.outbox.count_come(count);
                        bytes += count;
                        drained = !more && !hangup;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Flow::Blocked),
                    Err(error) => return Err(self.gone(&error.to_string())),
                },
            }
        }
        Ok(Flow::Idle)
    }

    fn gone(&self, why: &str) -> Fault {
        let place = if self.inbox.is_between_frames() { "" } else { " in the middle of a frame" };
        Fault::Ended(Disconnect::PeerGone(format!("{why}{place}")))
    }

    /// Checks a frame and does what it asks for, or prepares to receive its body.
    fn take(&mut self, header: Header, grants: &Grants, completions: &mut Vec<Completion>) -> Result<(), Fault> {
        let refuse = |why| Fault::Refuse(header.sequence, why);
        grants.incarnation(&header).map_err(refuse)?;
        if !self.outbox.acknowledge(header.acknowledged) {
            return Err(protocol("it acknowledged work that it was not sent"));
        }
        let is_work = matches!(header.opcode, Opcode::Write | Opcode::WriteImmediate | Opcode::ReadRequest);
        if is_work && header.sequence != self.outbox.executed() {
            return Err(protocol(format!("work {} came in place of {}", header.sequence, self.outbox.executed())));
        }
        match header.opcode {
            Opcode::Write | Opcode::WriteImmediate => {
                let immediate = (header.opcode == Opcode::WriteImmediate).then_some(header.immediate);
                let then = Then::Written { immediate, signalled: header.signalled };
                if header.len == 0 {
                    self.finish(then, completions);
                } else {
                    let (region, range) = grants.admit(&header, Access::PeerWrite).map_err(refuse)?;
                    if self.inbox.deliver(region, &range).map_err(protocol)? {
                        self.finish(then, completions);
                    } else {
                        self.inbox.begin(region.clone(), range, then);
                    }
                }
            }
            Opcode::ReadRequest => {
                let payload = if header.len == 0 {
                    Payload::Nothing
                } else {
                    let (region, range) = grants.admit(&header, Access::PeerRead).map_err(refuse)?;
                    Payload::Region(region.clone(), range)
                };
                let response = Header {
                    len: header.len,
                    sequence: header.sequence,
                    ..Header::plain(Opcode::ReadResponse, header.incarnation)
                };
                if !self.outbox.reply(Frame::new(&response, payload)) {
                    return Err(protocol("it has too many reads outstanding"));
                }
                self.outbox.count_executed(false);
                // At once, so that a write that follows on the lane finds the bytes read already.
                self.outbox.flush(&self.socket);
            }
            Opcode::ReadResponse => {
                let target = self.outbox.target(header.sequence);
                let Some((region, range)) = target.filter(|(_, range)| range.len() as u64 == header.len) else {
                    return Err(protocol("it answered a read that was not asked for"));
                };
                self.inbox.begin(region, range, Then::ReadDone(header.sequence));
            }
            Opcode::Bye => self.said_bye = true,
            Opcode::Acknowledge => {}
            Opcode::Refused => {
                let why = Refusal::from_code(header.immediate);
                return Err(Fault::Refused { lane: header.lane, sequence: header.sequence, why });
            }
        }
        Ok(())
    }

    fn finish(&mut self, then: Then, completions: &mut Vec<Completion>) {
        match then {
            Then::Written { immediate, signalled } => {
                self.outbox.count_executed(signalled);
                if let Some(immediate) = immediate {
                    completions.push(Completion::Immediate { link: self.link, lane: self.index, immediate });
                }
            }
            Then::ReadDone(sequence) => self.outbox.read_done(sequence),
        }
    }

    /// Takes the lane apart: its socket and the frames that shall still leave, `last` at their end.
    pub(super) fn part(self, all: bool, last: Header) -> (TcpStream, Rest) {
        let last = Header { acknowledged: self.outbox.executed(), ..last };
        (self.socket, self.outbox.into_rest(all, &last))
    }
}
