//! What one lane has to send: the ring of posted work, and the replies that the peer's reads are owed.
//!
//! A frame leaves as its header and its payload, the latter straight from the region. Posted work stays in its ring
//! until it is done *and reported*, in order, so the ring bounds what is outstanding, and a read's number is its place.
//! Work is done when it has left; with a signal, when the peer has acknowledged it; a read, when its bytes are here.

use super::frame::{self, HEADER_BYTES, Header, Opcode, padding};
use super::socket::Gather;
use crate::Region;
use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::ops::Range;

/// Bytes that an inline payload may have.
pub(super) const INLINE_BYTES: usize = 256;
/// Posted work that a lane holds.
pub(super) const QUEUE_DEPTH: usize = 256;
/// Replies that a lane owes at most: a peer has no more reads outstanding than its ring is deep, and then some news.
const MAX_REPLIES: usize = QUEUE_DEPTH + 1;
/// Bytes that one call sends before other lanes have their turn.
const BYTES_PER_TURN: usize = 1 << 20;
/// The same while the peer sends as much: what this end has sent is still in the caches then when the peer takes it.
const BYTES_BY_TURNS: usize = 1 << 18;
/// So much has come since this side last sent, if the peer sends as much. The kernel hands out some 64 KiB at once.
const MUCH: usize = 32 << 10;

/// Where the bytes of a read go.
type ReadTarget = (Region, Range<usize>);

/// Where a frame's payload is. Inline bytes live in the ring itself, so that posting allocates nothing.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)]
pub(super) enum Payload {
    Nothing,
    Inline([u8; INLINE_BYTES], usize),
    Region(Region, Range<usize>),
}

/// A frame to send.
#[derive(Debug)]
pub(super) struct Frame {
    header: [u8; HEADER_BYTES],
    payload: Payload,
}

impl Frame {
    /// A frame of this header and payload, whose length the header names.
    pub(super) fn new(header: &Header, payload: Payload) -> Self {
        Self { header: header.encode(), payload }
    }

    fn payload_len(&self) -> usize {
        match &self.payload {
            Payload::Nothing => 0,
            Payload::Inline(_, len) => *len,
            Payload::Region(_, range) => range.len(),
        }
    }

    fn len(&self) -> usize {
        let payload = self.payload_len();
        HEADER_BYTES + padding(payload).len() + payload
    }

    /// Adds what is left of the frame after its first `skip` bytes.
    fn gather<'a>(&'a self, skip: usize, out: &mut Gather<'a>) {
        out.slice(&self.header[skip.min(HEADER_BYTES)..]);
        let skip = skip.saturating_sub(HEADER_BYTES);
        let padding = padding(self.payload_len());
        out.slice(&padding[skip.min(padding.len())..]);
        let skip = skip.saturating_sub(padding.len());
        match &self.payload {
            Payload::Nothing => {}
            Payload::Inline(bytes, len) => out.slice(&bytes[skip.min(*len)..*len]),
            Payload::Region(region, range) => out.region(region, range.start + skip..range.end),
        }
    }
}

/// Sends frames, the first of them from byte `written` on; returns the bytes sent, and whether that was all that one
/// call may send.
fn transmit<'a>(
    socket: &TcpStream,
    frames: impl Iterator<Item = &'a Frame>,
    written: usize,
    limit: usize,
) -> io::Result<(usize, bool)> {
    let mut gather = Gather::new(limit);
    let mut skip = written;
    for frame in frames {
        if !gather.has_room() {
            break;
        }
        frame.gather(skip, &mut gather);
        skip = 0;
    }
    let sent = gather.send(socket)?;
    Ok((sent, sent == gather.bytes()))
}

/// How a turn of sending ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// Nothing is left to do.
    Idle,
    /// The socket will say when it goes on.
    Blocked,
    /// The turn is over, and more could be done at once.
    More,
}

/// One posted work request.
#[derive(Debug)]
struct Entry {
    frame: Frame,
    signal: Option<u64>,
    /// Where a read's bytes go.
    target: Option<ReadTarget>,
    done: bool,
}

/// How posted work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Done,
    Refused,
    Flushed,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Outbox {
    work: VecDeque<Entry>,
    /// Number of `work[0]` on this lane.
    first: u64,
    /// Index of the first work that has not left.
    unsent: usize,
    replies: VecDeque<Frame>,
    /// Bytes of the frame in progress that have left, and whether it is a reply.
    written: usize,
    replying: bool,
    /// How many of the peer's work requests have taken effect, and whether the peer waits to hear it.
    executed: u64,
    owes_news: bool,
    /// Bytes have left since [`Outbox::take_sent`].
    sent: bool,
    /// Bytes that have come since some left.
    come: usize,
    /// The socket takes no more; what it still delivers says why.
    broken: bool,
    incarnation: u32,
}

impl Outbox {
    /// An empty one, with room for all that it will ever hold.
    pub(super) fn new(incarnation: u32) -> Self {
        Self {
            work: VecDeque::with_capacity(QUEUE_DEPTH),
            first: 0,
            unsent: 0,
            replies: VecDeque::with_capacity(8),
            written: 0,
            replying: false,
            executed: 0,
            owes_news: false,
            sent: false,
            come: 0,
            broken: false,
            incarnation,
        }
    }

    /// Work requests that can be posted.
    pub(super) fn room(&self) -> usize {
        QUEUE_DEPTH - self.work.len()
    }

    /// Whether nothing is in front of the next posted work.
    pub(super) fn is_empty(&self) -> bool {
        self.work.is_empty() && self.replies.is_empty() && !self.broken
    }

    /// So many works have left that are not kept: they were posted while it was empty, the first with the latest news.
    pub(super) fn pass(&mut self, works: usize) {
        self.first += works as u64;
        self.note_sent();
        self.owes_news = false;
    }

    /// So many bytes of the work that was just posted have left, which was alone.
    pub(super) fn has_sent(&mut self, bytes: usize) {
        self.replying = false;
        if bytes > 0 {
            self.note_sent();
            self.owes_news = false;
        }
        self.account(bytes);
    }

    /// Number that the next posted work gets.
    pub(super) fn next_sequence(&self) -> u64 {
        self.first + self.work.len() as u64
    }

    /// Posts work; `target` makes it a read.
    pub(super) fn post(&mut self, frame: Frame, signal: Option<u64>, target: Option<ReadTarget>) {
        self.work.push_back(Entry { frame, signal, target, done: false });
    }

    /// Owes the peer a reply; says no if it is owed too many.
    pub(super) fn reply(&mut self, frame: Frame) -> bool {
        let room = self.replies.len() < MAX_REPLIES;
        if room {
            self.replies.push_back(frame);
        }
        room
    }

    /// How many of the peer's work requests have taken effect.
    pub(super) fn executed(&self) -> u64 {
        self.executed
    }

    /// One more of them has.
    pub(super) fn count_executed(&mut self, signalled: bool) {
        self.executed += 1;
        self.owes_news |= signalled;
    }

    /// Bytes have left.
    fn note_sent(&mut self) {
        (self.sent, self.come) = (true, 0);
    }

    /// So many bytes have come from the peer.
    pub(super) fn count_come(&mut self, bytes: usize) {
        self.come += bytes;
    }

    /// Whether the peer waits to hear what has taken effect, and no frame is about to tell it.
    pub(super) fn owes_news(&self) -> bool {
        self.owes_news && !self.broken && self.is_drained()
    }

    /// Whether bytes have left since the last time.
    pub(super) fn take_sent(&mut self) -> bool {
        std::mem::take(&mut self.sent)
    }

    fn is_drained(&self) -> bool {
        self.replies.is_empty() && self.unsent == self.work.len()
    }

    /// Tells the peer what it waits to hear, unless a frame that is about to leave tells it anyway.
    pub(super) fn tell_news(&mut self) {
        if self.owes_news() {
            let header = Header::plain(Opcode::Acknowledge, self.incarnation);
            self.replies.push_back(Frame::new(&header, Payload::Nothing));
        }
    }

    /// Learns how much of this side's work has taken effect; says no if that much has not left.
    pub(super) fn acknowledge(&mut self, count: u64) -> bool {
        let Some(news) = count.checked_sub(self.first) else { return true };
        let Some(news) = usize::try_from(news).ok().filter(|&news| news <= self.unsent) else { return false };
        for entry in self.work.iter_mut().take(news) {
            entry.done |= entry.target.is_none();
        }
        true
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self, socket: &TcpStream) -> Flow {
        let mut left = if self.come < MUCH { BYTES_PER_TURN } else { BYTES_BY_TURNS };
        loop {
            if self.broken || self.is_drained() {
                return Flow::Idle;
            }
            if left == 0 {
                return Flow::More;
            }
            if self.written == 0 {
                // By turns, so that a peer's reads do not hold up this side's work, nor the other way round.
                let unsent = self.unsent < self.work.len();
                self.replying = !self.replies.is_empty() && (!unsent || !self.replying);
                let posted = self.work.get_mut(self.unsent).map(|entry| &mut entry.frame);
                if let Some(frame) = if self.replying { self.replies.front_mut() } else { posted } {
                    frame::acknowledge(&mut frame.header, self.executed);
                }
            }
            let begins = self.written == 0;
            let result = if self.replying {
                transmit(socket, self.replies.iter(), self.written, left)
            } else {
                transmit(socket, self.work.iter().skip(self.unsent).map(|entry| &entry.frame), self.written, left)
            };
            match result {
                Ok((sent, all)) => {
                    left -= sent;
                    if sent > 0 {
                        self.note_sent();
                    }
                    self.owes_news &= sent == 0 || !begins;
                    self.account(sent);
                    if !all {
                        return Flow::Blocked;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Flow::Blocked,
                Err(_) => self.broken = true,
            }
        }
    }

    /// Moves past `sent` more bytes.
    fn account(&mut self, sent: usize) {
        self.written += sent;
        if self.replying {
            pop_sent(&mut self.replies, &mut self.written);
            return;
        }
        while let Some(entry) = self.work.get_mut(self.unsent) {
            let len = entry.frame.len();
            if self.written < len {
                return;
            }
            self.written -= len;
            entry.frame.payload = Payload::Nothing;
            entry.done = entry.signal.is_none() && entry.target.is_none();
            self.unsent += 1;
        }
    }

    /// Takes out the oldest work if it is done; its token, if it has one.
    pub(super) fn reap(&mut self) -> Option<Option<u64>> {
        if !self.work.front()?.done {
            return None;
        }
        self.first += 1;
        self.unsent -= 1;
        self.work.pop_front().map(|entry| entry.signal)
    }

    /// Whether [`Outbox::reap`] would find something.
    pub(super) fn is_ripe(&self) -> bool {
        self.work.front().is_some_and(|entry| entry.done)
    }

    fn sent_read(&mut self, sequence: u64) -> Option<&mut Entry> {
        let index = usize::try_from(sequence.checked_sub(self.first)?).ok()?;
        if index >= self.unsent {
            return None;
        }
        self.work.get_mut(index).filter(|entry| entry.target.is_some())
    }

    /// Where the bytes of an outstanding read go.
    pub(super) fn target(&mut self, sequence: u64) -> Option<ReadTarget> {
        self.sent_read(sequence)?.target.clone()
    }

    /// The bytes of a read have arrived.
    pub(super) fn read_done(&mut self, sequence: u64) {
        if let Some(entry) = self.sent_read(sequence) {
            entry.target = None;
            entry.done = true;
        }
    }

    /// Ends all work, oldest first: with `refused`, that work was refused, what was posted before it took
    /// effect (the bytes of a read may still be missing), and what was posted after it did not.
    pub(super) fn abandon(&self, refused: Option<u64>, mut report: impl FnMut(Option<u64>, Fate)) {
        if refused.is_some_and(|sequence| sequence < self.first) {
            report(None, Fate::Refused);
        }
        for (sequence, entry) in (self.first..).zip(&self.work) {
            let fate = match refused {
                Some(bad) if sequence == bad => Fate::Refused,
                Some(bad) if sequence < bad && entry.target.is_none() => Fate::Done,
                Some(_) => Fate::Flushed,
                None if entry.done => Fate::Done,
                None => Fate::Flushed,
            };
            report(entry.signal, fate);
        }
    }

    /// What still has to leave when the lane closes: the frame in progress, with `all` everything that was posted, and
    /// `last`.
    pub(super) fn into_rest(self, all: bool, last: &Header) -> Rest {
        let midway = usize::from(self.written > 0);
        let (replies, work) = match (all, self.replying) {
            (true, _) => (self.replies.len(), self.work.len()),
            (false, true) => (midway, 0),
            (false, false) => (0, midway),
        };
        let replies = self.replies.into_iter().take(replies);
        let work = self.work.into_iter().skip(self.unsent).map(|entry| entry.frame).take(work);
        let mut frames: VecDeque<Frame> =
            if self.replying { replies.chain(work).collect() } else { work.chain(replies).collect() };
        frames.push_back(Frame::new(last, Payload::Nothing));
        Rest { frames, written: self.written }
    }
}

/// The last frames of a closing lane.
#[derive(Debug)]
pub(super) struct Rest {
    frames: VecDeque<Frame>,
    written: usize,
}

impl Rest {
    /// Sends what the socket takes.
    pub(super) fn flush(&mut self, socket: &TcpStream) -> io::Result<Flow> {
        let mut left = BYTES_PER_TURN;
        while !self.frames.is_empty() {
            if left == 0 {
                return Ok(Flow::More);
            }
            match transmit(socket, self.frames.iter(), self.written, left) {
                Ok((sent, all)) => {
                    left -= sent;
                    self.written += sent;
                    pop_sent(&mut self.frames, &mut self.written);
                    if !all {
                        return Ok(Flow::Blocked);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Flow::Blocked),
                Err(error) => return Err(error),
            }
        }
        Ok(Flow::Idle)
    }
}

/// Drops the frames that have left whole; `written` bytes of the rest have left.
fn pop_sent(frames: &mut VecDeque<Frame>, written: &mut usize) {
    while let Some(len) = frames.front().map(Frame::len).filter(|len| len <= written) {
        *written -= len;
        frames.pop_front();
    }
}
