//! What one lane receives: a stage for headers and small payloads, and the body that goes straight to its region.

use super::frame::{FrameError, HEADER_BYTES, Header, LEAD_BYTES, padding};
use super::socket;
use crate::{Region, TransportError};
use std::io;
use std::net::TcpStream;
use std::ops::Range;

/// Room for what one call may find: loopback, and cards that put segments together, hand over up to 64 KiB at once. What comes
/// whole in one is copied from here, which is quicker than another call.
const STAGE_BYTES: usize = 64 << 10;

/// What happens when a body is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// The peer's write has taken effect.
    Written { immediate: Option<u32>, signalled: bool },
    /// A read of this side is done.
    ReadDone(u64),
}

/// What the bytes received so far amount to.
#[derive(Debug)]
pub(super) enum Arrival {
    /// A header; [`Inbox::begin`] is called if a body follows.
    Header(Header),
    /// A body is in its region.
    Body(Then),
    /// More bytes are needed.
    Starved,
}

#[derive(Debug)]
struct Body {
    /// What comes before it.
    padding: usize,
    region: Region,
    left: Range<usize>,
    then: Then,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Inbox {
    stage: Box<[u8]>,
    staged: Range<usize>,
    body: Option<Body>,
    /// The next header is the first since nothing was staged.
    first: bool,
    /// The stage could not hold the body behind the last such header. The next header and its padding are received alone then: its
    /// body needs no copy.
    large: bool,
}

impl Inbox {
    /// An empty one.
    pub(super) fn new() -> Self {
        Self { stage: vec![0; STAGE_BYTES].into(), staged: 0..0, body: None, first: true, large: false }
    }

    /// Puts a body into its region if all of it is staged; says whether it was.
    pub(super) fn deliver(&mut self, region: &Region, range: &Range<usize>) -> Result<bool, InboxError> {
        let before = padding(range.len()).len();
        if std::mem::take(&mut self.first) {
            self.large = HEADER_BYTES + before + range.len() > STAGE_BYTES;
        }
        let start = self.staged.start + before;
        let whole = start..start + range.len();
        if whole.end > self.staged.end {
            return Ok(false);
        }
        region.write_here(range.start, &self.stage[whole.clone()])?;
        self.staged.start = whole.end;
        Ok(true)
    }

    /// Expects `range.len()` bytes for a region, as the checked header said.
    pub(super) fn begin(&mut self, region: Region, range: Range<usize>, then: Then) {
        self.body = Some(Body { padding: padding(range.len()).len(), region, left: range, then });
    }

    /// Whether the stream may end here.
    pub(super) fn is_between_frames(&self) -> bool {
        self.body.is_none() && self.staged.is_empty()
    }

    /// The next thing that is complete.
    pub(super) fn next(&mut self) -> Result<Arrival, InboxError> {
        if let Some(body) = &mut self.body {
            let skipped = body.padding.min(self.staged.len());
            body.padding -= skipped;
            self.staged.start += skipped;
            let count = body.left.len().min(self.staged.len());
            body.region.write_here(body.left.start, &self.stage[self.staged.start..self.staged.start + count])?;
            body.left.start += count;
            self.staged.start += count;
            if !body.left.is_empty() {
                return Ok(Arrival::Starved);
            }
            let then = body.then;
            self.body = None;
            return Ok(Arrival::Body(then));
        }
        Ok(match Header::parse(&self.stage[self.staged.clone()])? {
            Some(header) => {
                self.staged.start += HEADER_BYTES;
                Arrival::Header(header)
            }
            None => Arrival::Starved,
        })
    }

    /// Receives after [`Arrival::Starved`], `limit` bytes of body at most; returns the bytes, and whether there may be more
    /// at once. Zero bytes are the end of the stream.
    pub(super) fn fill(&mut self, socket: &TcpStream, limit: usize) -> io::Result<(usize, bool)> {
        // What is staged is less than a header.
        self.stage.copy_within(self.staged.clone(), 0);
        self.staged = 0..self.staged.len();
        let body = self.body.as_ref().filter(|body| body.padding == 0).map(|body| {
            let count = body.left.len().min(limit);
            (&body.region, body.left.start..body.left.start + count)
        });
        let whole = self.body.as_ref().is_none_or(|body| body.left.len() <= limit);
        let direct = body.as_ref().map_or(0, |(_, range)| range.len());
        // The stage only takes what comes after the whole body.
        let room = match &self.body {
            Some(body) if body.padding > 0 => body.padding,
            None if self.large => LEAD_BYTES,
            _ if whole => self.stage.len(),
            _ => self.staged.end,
        };
        self.first |= self.body.is_none() && self.staged.is_empty();
        let stage = &mut self.stage[self.staged.end..room];
        let asked = direct + stage.len();
        let count = socket::receive(socket, body, stage)?;
        if let Some(body) = &mut self.body {
            body.left.start += count.min(direct);
        }
        self.staged.end += count.saturating_sub(direct);
        Ok((count, count == asked))
    }
}

/// Why bytes could not be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum InboxError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Region(#[from] TransportError),
}

#[cfg(test)]
mod tests {
    use super::super::frame::{LARGE_BYTES, Opcode};
    use super::*;
    use crate::HostMemory;
    use std::io::Write;
    use std::net::{Ipv4Addr, TcpListener};
    use std::sync::Arc;

    const LEN: usize = STAGE_BYTES;

    /// Large bodies behind their padding land at their places, wherever the stream is cut: the first of them through the stage, the
    /// next, whose header is received alone, without it.
    #[test]
    fn a_large_body_begins_behind_its_padding() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_nodelay(true).unwrap();
        let (socket, _) = listener.accept().unwrap();
        let region = Region::new(Arc::new(HostMemory::allocate(2 * LEN, None).unwrap()));
        let mut inbox = Inbox::new();
        for (place, cuts) in [(0, [1, 56, 57]), (LEN, [55, 100, 127]), (0, [56, 128, 129]), (LEN, [128, 200, 32 << 10])]
        {
            let header = Header { len: LEN as u64, ..Header::plain(Opcode::Write, 1) };
            let payload: Vec<u8> = (0..LEN).map(|index| (index + place + cuts[0]) as u8).collect();
            let frame = [&header.encode()[..], &[0xEE; LEAD_BYTES - HEADER_BYTES], &payload].concat();
            let (mut from, mut whole) = (0, 0);
            for cut in cuts.into_iter().chain([frame.len()]) {
                peer.write_all(&frame[from..cut]).unwrap();
                let mut come = from;
                from = cut;
                while come < cut {
                    come += inbox.fill(&socket, usize::MAX).unwrap().0;
                    loop {
                        match inbox.next().unwrap() {
                            Arrival::Header(header) => {
                                assert!(cut >= HEADER_BYTES && header.len == LEN as u64);
                                assert!(!inbox.deliver(&region, &(place..place + LEN)).unwrap());
                                let then = Then::Written { immediate: None, signalled: false };
                                inbox.begin(region.clone(), place..place + LEN, then);
                            }
                            Arrival::Body(_) => whole += 1,
                            Arrival::Starved => break,
                        }
                    }
                }
            }
            let mut landed = vec![0; LEN];
            region.read(place, &mut landed).unwrap();
            assert!(whole == 1 && landed == payload && inbox.is_between_frames());
        }
    }

    /// What comes with one call is copied behind its padding: the largest without, the smallest with one, the largest that the stage holds.
    #[test]
    fn a_payload_that_comes_whole_is_delivered_from_the_stage() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        let region = Region::new(Arc::new(HostMemory::allocate(LEN, None).unwrap()));
        let mut inbox = Inbox::new();
        for len in [LARGE_BYTES, LARGE_BYTES + 1, STAGE_BYTES - LEAD_BYTES] {
            let header = Header { len: len as u64, ..Header::plain(Opcode::Write, 1) };
            let payload: Vec<u8> = (0..len).map(|index| (index + len) as u8).collect();
            peer.write_all(&[&header.encode()[..], padding(len), &payload].concat()).unwrap();
            // All of it has come, wherever the kernel cut it.
            let mut come = vec![0; LEN + LEAD_BYTES];
            while socket.peek(&mut come).unwrap() < HEADER_BYTES + padding(len).len() + len {}
            inbox.fill(&socket, usize::MAX).unwrap();
            assert!(matches!(inbox.next().unwrap(), Arrival::Header(header) if header.len == len as u64));
            assert!(inbox.deliver(&region, &(0..len)).unwrap());
            let mut landed = vec![0; len];
            region.read(0, &mut landed).unwrap();
            assert!(landed == payload && inbox.is_between_frames());
        }
    }
}
