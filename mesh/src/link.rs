//! One link's state: its regions, what it has counted, what it still has to post.

use crate::counter::ImmediateCounter;
use crate::layout::{Direction, SlotLayout};
use crate::{MemberOptions, MeshError, Peer};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;
use stepmesh_proto::{HEADER_MAX_BYTES, Header, Immediate, MAX_PARTS, Part};
use stepmesh_transport::{Descriptor, Endpoint, LinkId, Op, PostError, Region, Remote, RemoteRegion, Source, Work};

/// A lane's stripe touches every part at most once; then comes the closing write.
const CHAIN: usize = MAX_PARTS + 1;
/// Parts closer than this leave in one write, along with what lies between: those bytes cost less than another write.
const CLOSE: usize = 512;

/// How far a link has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Opened here; the peer's half or the connection is missing.
    Connecting,
    /// Connected; the peer's grants are missing or cannot be placed yet.
    Granting,
    /// Transfers are possible.
    Up,
    /// No new transfers: the link will be fenced when those under way are done, or at this time.
    Draining(Instant),
}

/// Held by whatever still reads or writes the link's slots; the fence is complete when none is left.
#[derive(Debug)]
pub(crate) struct InUse;

#[derive(Debug, Clone)]
struct Outgoing {
    sequence: u16,
    header: [u8; HEADER_MAX_BYTES],
    header_bytes: usize,
    /// What of the payload is to be written; empty where the peer reads it in place.
    parts: [Part; MAX_PARTS],
    lanes: u8,
    posted: u8,
}

/// A link to one peer, of one incarnation.
pub(crate) struct Link {
    pub(crate) peer: Peer,
    pub(crate) incarnation: u32,
    pub(crate) id: LinkId,
    pub(crate) lanes: u8,
    /// Payloads below this many bytes go over one lane.
    pub(crate) stripe_bytes: usize,
    pub(crate) stage: Stage,
    /// When the link has to be up.
    pub(crate) deadline: Instant,
    pub(crate) in_use: Arc<InUse>,
    pub(crate) grants: Option<Vec<Descriptor>>,
    /// Where the peer's headers land, `[slots, 256]`: always memory that the CPU reads.
    pub(crate) headers: Option<Region>,
    /// Where the peer's payloads land; none where they are read in the peer's memory.
    pub(crate) landing: Option<Region>,
    /// Where headers land at the peer.
    pub(crate) peer_headers: Option<RemoteRegion>,
    /// Where payloads land at the peer; none where it reads them in this side's memory.
    pub(crate) peer_landing: Option<RemoteRegion>,
    /// The peer's payload area where it is read in place.
    pub(crate) peer_outbox: Option<Region>,
    /// Where this side's payloads are written from; none where they are produced in the peer's memory or read in place.
    pub(crate) outbox: Option<Region>,
    /// Immediates that came before the peer's grants could be taken up.
    pub(crate) early: Vec<u32>,
    counters: Vec<ImmediateCounter>,
    /// The header of each slot's latest transfer that has landed whole. In a box, so that whoever takes it copies nothing.
    #[allow(clippy::vec_box)]
    landed: Vec<Box<Header>>,
    /// A header as it landed, copied out of memory that the peer may write.
    copied: [u8; HEADER_MAX_BYTES],
    outgoing: Vec<Outgoing>,
    backlog: VecDeque<u16>,
}

impl Link {
    pub(crate) fn new(peer: Peer, incarnation: u32, id: LinkId, options: &MemberOptions, deadline: Instant) -> Self {
        let slots = usize::from(options.layout.microbatches());
        let outgoing = Outgoing {
            sequence: 0,
            header: [0; HEADER_MAX_BYTES],
            header_bytes: 0,
            parts: [Part::default(); MAX_PARTS],
            lanes: 0,
            posted: 0,
        };
        Self {
            peer,
            incarnation,
            id,
            lanes: options.lanes,
            stripe_bytes: options.stripe_bytes,
            stage: Stage::Connecting,
            deadline,
            in_use: Arc::new(InUse),
            grants: None,
            headers: None,
            landing: None,
            peer_headers: None,
            peer_landing: None,
            peer_outbox: None,
            outbox: None,
            early: Vec::new(),
            counters: vec![ImmediateCounter::default(); slots],
            landed: vec![Box::default(); slots],
            copied: [0; HEADER_MAX_BYTES],
            outgoing: vec![outgoing; slots],
            backlog: VecDeque::with_capacity(slots),
        }
    }

    /// FFN side: where the peer's requests are read.
    pub(crate) fn input(&self) -> Option<Region> {
        self.peer_outbox.clone().or_else(|| self.landing.clone())
    }

    /// FFN side: where replies to the peer are produced.
    pub(crate) fn output(&self) -> Option<Region> {
        self.outbox.clone().or_else(|| self.peer_landing.as_ref()?.mapped.clone())
    }

    pub(crate) fn counter(&mut self, slot: u16) -> Option<&mut ImmediateCounter> {
        self.counters.get_mut(usize::from(slot))
    }

    /// Reads the header that landed for `slot`: copied out once, then checked.
    pub(crate) fn read_header(&mut self, slot: u16) -> Result<&Header, String> {
        let headers = self.headers.as_ref().ok_or("nothing was granted")?;
        headers.read(usize::from(slot) * HEADER_MAX_BYTES, &mut self.copied).map_err(|error| error.to_string())?;
        let header = &mut self.landed[usize::from(slot)];
        header.read(&self.copied).map_err(|error| error.to_string())?;
        Ok(header)
    }

    /// The header of the transfer that has landed for `slot`.
    pub(crate) fn landed(&self, slot: u16) -> &Header {
        &self.landed[usize::from(slot)]
    }

    /// Takes that header, for one that is worth nothing.
    pub(crate) fn take_landed(&mut self, slot: u16, header: &mut Box<Header>) {
        std::mem::swap(&mut self.landed[usize::from(slot)], header);
    }

    /// Readies the header's slot's next transfer and posts as much as the lanes take; the rest goes out in [`Link::flush`].
    pub(crate) fn send(
        &mut self,
        endpoint: &mut dyn Endpoint,
        layout: &SlotLayout,
        direction: Direction,
        header: &mut Header,
    ) -> Result<(), MeshError> {
        let slot = header.slot;
        let outgoing = self
            .outgoing
            .get_mut(usize::from(slot))
            .ok_or_else(|| MeshError::NoMicrobatch { slot, microbatches: layout.microbatches() })?;
        outgoing.sequence = outgoing.sequence.wrapping_add(1);
        header.incarnation = self.incarnation;
        header.sequence = outgoing.sequence;
        outgoing.header_bytes = header.encode(&mut outgoing.header);
        outgoing.lanes = 1;
        if self.outbox.is_some() {
            outgoing.parts = [Part::default(); MAX_PARTS];
            outgoing.parts[..header.parts().len()].copy_from_slice(header.parts());
            let payload = payload_bytes(&outgoing.parts);
            if payload > 0 && payload >= self.stripe_bytes {
                outgoing.lanes = self.lanes;
            }
        }
        outgoing.posted = 0;
        if !self.backlog.is_empty() || !self.post_slot(endpoint, layout, direction, slot)? {
            self.backlog.push_back(slot);
        }
        Ok(())
    }

    /// Posts what is in the backlog, as far as the lanes take it.
    pub(crate) fn flush(
        &mut self,
        endpoint: &mut dyn Endpoint,
        layout: &SlotLayout,
        direction: Direction,
    ) -> Result<(), MeshError> {
        while let Some(&slot) = self.backlog.front() {
            if !self.post_slot(endpoint, layout, direction, slot)? {
                break;
            }
            self.backlog.pop_front();
        }
        Ok(())
    }

    pub(crate) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Posts the remaining lanes of a slot's transfer; false when a lane was full.
    fn post_slot(
        &mut self,
        endpoint: &mut dyn Endpoint,
        layout: &SlotLayout,
        direction: Direction,
        slot: u16,
    ) -> Result<bool, MeshError> {
        let Some(headers) = &self.peer_headers else { return Ok(true) };
        let outgoing = &mut self.outgoing[usize::from(slot)];
        let payload = self.outbox.as_ref().zip(self.peer_landing.as_ref());
        let start = || layout.slot_offset(direction, slot);
        let payload = payload.map(|(region, landing)| Payload { region, landing, start: start() });
        while outgoing.posted < outgoing.lanes {
            let lane = outgoing.posted;
            let immediate = Immediate { slot, lanes: outgoing.lanes, lane, sequence: outgoing.sequence };
            let immediate = immediate.encode().map_err(|error| MeshError::Transfer(error.to_string()))?;
            let closing = Work {
                op: Op::WriteImmediate {
                    source: if lane == 0 {
                        Source::Inline(&outgoing.header[..outgoing.header_bytes])
                    } else {
                        Source::Inline(&[])
                    },
                    remote: (lane == 0)
                        .then_some(Remote { region: headers, offset: u64::from(slot) * HEADER_MAX_BYTES as u64 }),
                    immediate,
                },
                signal: None,
            };
            let posted = match &payload {
                // Where it is: a copy of what was just written word by word waits for those words.
                None => endpoint.post(self.id, lane, std::slice::from_ref(&closing)),
                Some(payload) => {
                    let mut writes = [(0, 0); MAX_PARTS];
                    let count = share(&outgoing.parts, lane, outgoing.lanes, &mut writes);
                    let mut chain = [closing; CHAIN];
                    for (work, &write) in chain.iter_mut().zip(&writes[..count]) {
                        *work = payload.write(write);
                    }
                    endpoint.post(self.id, lane, &chain[..=count])
                }
            };
            match posted {
                Ok(()) => outgoing.posted += 1,
                Err(PostError::WouldBlock) => return Ok(false),
                // The link has ended; its completion is on the way and says why.
                Err(PostError::NotConnected(_)) => return Ok(true),
                Err(error) => return Err(MeshError::Transfer(error.to_string())),
            }
        }
        Ok(true)
    }
}

fn payload_bytes(parts: &[Part]) -> usize {
    parts.iter().map(|part| part.bytes() as usize).sum()
}

/// Where a slot's payload is written from and to: it starts at the same offset on both sides.
struct Payload<'a> {
    region: &'a Region,
    landing: &'a RemoteRegion,
    start: usize,
}

impl<'a> Payload<'a> {
    /// The write of a stretch of it.
    fn write(&self, (offset, len): (usize, usize)) -> Work<'a> {
        let offset = self.start + offset;
        let source = Source::Region(self.region, offset, len);
        Work { op: Op::Write { source, remote: Remote { region: self.landing, offset: offset as u64 } }, signal: None }
    }
}

/// Finds what one lane writes of a slot's payload, an equal stretch of the parts' concatenation, as offsets and lengths;
/// returns how many writes these are.
fn share(parts: &[Part], lane: u8, lanes: u8, writes: &mut [(usize, usize); MAX_PARTS]) -> usize {
    let share = payload_bytes(parts).div_ceil(usize::from(lanes)).next_multiple_of(64);
    let (first, last) = (usize::from(lane) * share, (usize::from(lane) + 1) * share);
    let (mut start, mut count) = (0, 0);
    for part in parts {
        let end = start + part.bytes() as usize;
        let (from, to) = (first.max(start), last.min(end));
        if from < to {
            let (offset, len) = (part.offset as usize + (from - start), to - from);
            match writes[..count].last_mut() {
                Some((begin, run)) if (*begin + *run..*begin + *run + CLOSE).contains(&offset) => {
                    *run = offset + len - *begin;
                }
                _ => {
                    writes[count] = (offset, len);
                    count += 1;
                }
            }
        }
        start = end;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(offset: usize, bytes: u32) -> Part {
        Part { rows: 1, row_bytes: bytes, offset: offset as u32, ..Part::default() }
    }

    fn writes(parts: &[Part], lane: u8, lanes: u8) -> Vec<(usize, usize)> {
        let mut writes = [(0, 0); MAX_PARTS];
        let count = share(parts, lane, lanes, &mut writes);
        writes[..count].to_vec()
    }

    #[test]
    fn parts_that_lie_close_leave_in_one_write_and_others_by_themselves() {
        let far = 1100 + CLOSE;
        let parts = [part(0, 1000), part(1024, 40), part(1064, 0), part(1064, 36), part(far, 8)];
        assert_eq!(writes(&parts, 0, 1), [(0, 1100), (far, 8)]);
        let near = 1064 + CLOSE - 1;
        assert_eq!(writes(&[part(0, 1000), part(1024, 40), part(near, 8)], 0, 1), [(0, near + 8)]);
        // Never backwards.
        assert_eq!(writes(&[part(1024, 64), part(0, 64)], 0, 1), [(1024, 64), (0, 64)]);
    }

    #[test]
    fn the_lanes_share_what_the_parts_have_and_none_writes_what_another_one_does() {
        let parts = [part(0, 1000), part(1024, 200), part(4096, 3000), part(7168, 1), part(7424, 77)];
        for lanes in 1..=8 {
            let mut hits = vec![0_u8; 8192];
            for lane in 0..lanes {
                for (offset, len) in writes(&parts, lane, lanes) {
                    hits[offset..offset + len].iter_mut().for_each(|hit| *hit += 1);
                }
            }
            assert!(hits.iter().all(|&hit| hit <= 1), "{lanes} lanes");
            for part in parts {
                let (offset, len) = (part.offset as usize, part.bytes() as usize);
                assert!(hits[offset..offset + len].iter().all(|&hit| hit == 1), "{lanes} lanes, the part at {offset}");
            }
        }
    }
}
