//! The FFN side: `next_batch` → compute → `respond`.

use crate::arrivals::{Arrivals, Policy};
use crate::attention::NO_GROUP;
use crate::control::Control;
use crate::layout::{Direction, SlotLayout};
use crate::link::{InUse, Link};
use crate::member::{Arrival, Member, MemberOptions, Patience};
use crate::{MeshError, MeshEvent, Role};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_proto::{Flags, Header, Part, Stamps, control::from_member};
use stepmesh_transport::{Clock, Device, Region, Waker};

/// An FFN instance in the mesh. Owned and driven by one thread: every call makes progress.
pub struct FfnMesh {
    pub(crate) member: Member,
    arrivals: Arrivals,
    /// When the request that waits in each (slot, rank) was received.
    requests: Vec<Option<u64>>,
    /// The segment of each (slot, rank) while it is in no batch, from its link's first on.
    idle: Vec<Option<Segment>>,
    released: Vec<usize>,
    /// For the segments of batches to come.
    spare: Vec<Vec<Segment>>,
}

/// One attention instance's rows in a batch: what it sent, and where its reply goes. Both are the slots themselves.
#[derive(Debug)]
pub struct Segment(Box<Seat>);

/// What a segment is of. Made once for each slot of a link, and passed from batch to batch.
#[derive(Debug)]
struct Seat {
    rank: usize,
    header: Box<Header>,
    received_ns: u64,
    handed_out_ns: u64,
    layout: Arc<SlotLayout>,
    slot: u16,
    input: Region,
    output: Region,
    reply: Header,
    failure: Option<[u8; 16]>,
    // Last, so that the fence is complete only when the regions above are gone.
    in_use: Arc<InUse>,
}

impl Segment {
    /// That of a link's slot, without a request.
    fn new(link: &Link, layout: &Arc<SlotLayout>, slot: u16, rank: usize) -> Option<Self> {
        let (input, output) = (link.input()?, link.output()?);
        Some(Self(Box::new(Seat {
            rank,
            header: Box::default(),
            received_ns: 0,
            handed_out_ns: 0,
            layout: layout.clone(),
            slot,
            input,
            output,
            reply: Header::default(),
            failure: None,
            in_use: link.in_use.clone(),
        })))
    }

    /// The attention instance.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// The application's bytes.
    pub fn app(&self) -> [u8; 16] {
        self.0.header.app
    }

    /// The parts that were sent.
    pub fn parts(&self) -> &[Part] {
        self.0.header.parts()
    }

    /// Rows of the first part; zero if there is none.
    pub fn rows(&self) -> usize {
        self.parts().first().map_or(0, |part| part.rows as usize)
    }

    /// The bytes in use of a part, `[rows, row_bytes]`, in the slot they landed in; empty for a part that was not sent.
    pub fn part(&self, part: usize) -> &[u8] {
        let Some(used) = self.parts().get(part) else { return &[] };
        let start = self.request_start() + used.offset as usize;
        // SAFETY: the request has landed and the attention instance may not write the slot before the reply, which
        // consumes this segment; a peer that does so anyway changes values only.
        unsafe { self.0.input.bytes(start..start + used.bytes() as usize) }.unwrap_or_default()
    }

    /// The bytes of a reply part, as long as the layout allows: the landing slot itself where the provider maps it.
    pub fn reply_mut(&mut self, part: usize) -> &mut [u8] {
        let (_, output) = self.split(0, part);
        output
    }

    /// A request part and a reply part at once.
    pub fn split(&mut self, request: usize, reply: usize) -> (&[u8], &mut [u8]) {
        let input = self.part(request);
        let Some(range) = self.reply_range(reply) else { return (input, &mut []) };
        // SAFETY: the reply slot is this segment's alone until `respond` takes it, and never the memory of a request;
        // the slice borrows the segment exclusively.
        let output = unsafe { self.0.output.bytes_mut(range) }.unwrap_or_default();
        (input, output)
    }

    /// Where the bytes in use of a part lie, for what must outlive this segment: the region keeps the memory in being, no
    /// more; after `respond` the attention instance may write there.
    pub fn part_place(&self, part: usize) -> Option<(Region, Range<usize>)> {
        let used = self.parts().get(part)?;
        let start = self.request_start() + used.offset as usize;
        Some((self.0.input.clone(), start..start + used.bytes() as usize))
    }

    /// Where a reply part goes, as long as the layout allows; as [`Segment::part_place`].
    pub fn reply_place(&self, part: usize) -> Option<(Region, Range<usize>)> {
        Some((self.0.output.clone(), self.reply_range(part)?))
    }

    fn request_start(&self) -> usize {
        self.0.layout.slot_offset(Direction::A2F, self.0.slot)
    }

    fn reply_range(&self, part: usize) -> Option<Range<usize>> {
        self.0.layout.part_range(Direction::F2A, self.0.slot, part)
    }

    /// Says which reply parts are in use. Offsets are filled in by the mesh.
    pub fn set_reply(&mut self, parts: &[Part]) -> Result<(), MeshError> {
        let Seat { layout, reply, .. } = &mut *self.0;
        layout.place(Direction::F2A, parts, reply)
    }

    /// Answers that this segment could not be processed; at most 16 bytes of the reason travel.
    pub fn fail(&mut self, reason: &str) {
        let mut bytes = [0; 16];
        let length = (0..=reason.len().min(16)).rev().find(|&length| reason.is_char_boundary(length)).unwrap_or(0);
        bytes[..length].copy_from_slice(&reason.as_bytes()[..length]);
        self.0.failure = Some(bytes);
    }
}

/// The requests of one (microbatch, group), by ascending rank. To be answered with [`FfnMesh::respond`]; a batch that
/// is dropped instead leaves its requests unanswered and their slots in use.
#[derive(Debug)]
pub struct Batch {
    /// The microbatch.
    pub microbatch: u16,
    /// The group: the layer.
    pub group: u32,
    /// The attention instances' rows.
    pub segments: Vec<Segment>,
}

/// The place of one part of all attention instances: `[ranks, rows, row_bytes]` with a fixed stride between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartArray {
    /// Address of rank 0's first row.
    pub base: usize,
    /// Bytes from one rank's first row to the next rank's.
    pub rank_stride_bytes: usize,
}

impl FfnMesh {
    /// Starts to join. [`FfnMesh::poll`] until [`FfnMesh::rank`] is known, or use [`FfnMesh::wait_complete`].
    pub fn new(
        options: MemberOptions,
        device: Arc<dyn Device>,
        control: Box<dyn Control>,
        clock: Clock,
    ) -> Result<Self, MeshError> {
        let endpoint = device.endpoint()?;
        Self::with_endpoint(options, device, endpoint, control, clock)
    }

    /// As [`FfnMesh::new`], on an endpoint that exists already (so that the control plane could be given its waker).
    pub fn with_endpoint(
        options: MemberOptions,
        device: Arc<dyn Device>,
        endpoint: Box<dyn stepmesh_transport::Endpoint>,
        control: Box<dyn Control>,
        clock: Clock,
    ) -> Result<Self, MeshError> {
        let slots = options.layout.microbatches();
        let member = Member::new(Role::Ffn, options, device, endpoint, control, clock)?;
        Ok(Self {
            member,
            arrivals: Arrivals::new(slots, 0),
            requests: Vec::new(),
            idle: Vec::new(),
            released: Vec::new(),
            spare: Vec::new(),
        })
    }

    /// This instance's rank, once admitted.
    pub fn rank(&self) -> Option<u32> {
        self.member.rank
    }

    /// FFN instances of the deployment, once admitted: how many shards there are.
    pub fn ffn(&self) -> usize {
        self.member.siblings
    }

    /// Attention instances of the deployment, once admitted.
    pub fn attention(&self) -> usize {
        self.member.peers
    }

    /// All ranks are held and all links are up.
    pub fn is_complete(&self) -> bool {
        self.member.complete
    }

    /// Wakes [`FfnMesh::sleep`] and [`FfnMesh::next_batch`] from another thread.
    pub fn waker(&self) -> Waker {
        self.member.waker()
    }

    /// The clock that deadlines are meant by.
    pub fn clock(&self) -> &Clock {
        &self.member.clock
    }

    /// The next thing that happened besides requests.
    pub fn next_event(&mut self) -> Option<MeshEvent> {
        self.member.events.pop_front()
    }

    /// Sends the application's message to the scheduler.
    pub fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        self.member.send_control(body)
    }

    /// Where a request part of a microbatch lies for all ranks, for kernels that take segments; none where the device does not
    /// place its payloads ([`Device::places_payloads`]).
    pub fn part_array(&self, microbatch: u16, part: usize) -> Option<PartArray> {
        let layout = &self.member.options.layout;
        let first = layout.part_range(Direction::A2F, microbatch, part)?.start;
        let base = self.member.space.as_ref()?.base().as_ptr() as usize + first;
        Some(PartArray { base, rank_stride_bytes: layout.area_bytes(Direction::A2F).ok()? })
    }

    /// Where a part of an attention instance's requests for a microbatch is read, as long as the layout allows; for work that is
    /// captured ahead ([`crate::FfnStep`]), until the link goes down.
    pub fn request_place(&self, rank: usize, microbatch: u16, part: usize) -> Option<(Region, Range<usize>)> {
        let range = self.member.options.layout.part_range(Direction::A2F, microbatch, part)?;
        Some((self.member.links.get(rank)?.as_ref()?.input()?, range))
    }

    /// Where a reply part goes; as [`FfnMesh::request_place`].
    pub fn reply_place(&self, rank: usize, microbatch: u16, part: usize) -> Option<(Region, Range<usize>)> {
        let range = self.member.options.layout.part_range(Direction::F2A, microbatch, part)?;
        Some((self.member.links.get(rank)?.as_ref()?.output()?, range))
    }

    /// When, with no further arrival, the policy will next release something.
    pub fn next_release(&self, policy: Policy) -> Option<Instant> {
        let until = self.until_release(policy)?;
        self.member.clock.now().checked_add(until)
    }

    fn until_release(&self, policy: Policy) -> Option<Duration> {
        let release_ns = self.arrivals.next_release_ns(policy)?;
        Some(Duration::from_nanos(release_ns.saturating_sub(self.member.clock.now_ns())))
    }

    /// Makes progress without blocking.
    pub fn poll(&mut self) -> Result<(), MeshError> {
        self.member.poll()?;
        let slots = self.member.options.layout.microbatches();
        let seats = usize::from(slots) * self.member.peers;
        if self.requests.len() != seats {
            self.arrivals = Arrivals::new(slots, self.member.peers);
            self.requests = (0..seats).map(|_| None).collect();
            self.idle = (0..seats).map(|_| None).collect();
            // What policy `all` needs at most; the others, which may hand out more batches of fewer segments, add their own.
            self.spare = (0..slots).map(|_| Vec::with_capacity(self.member.peers)).collect();
        }
        while let Some(end) = self.member.ended.pop_front() {
            self.arrivals.lost(end.rank);
            for seat in (0..seats).skip(end.rank).step_by(self.member.peers) {
                self.requests[seat] = None;
                self.idle[seat] = None;
            }
        }
        while let Some(arrival) = self.member.arrivals.pop_front() {
            self.receive(arrival);
        }
        Ok(())
    }

    fn receive(&mut self, arrival: Arrival) {
        let Arrival { rank, slot, received_ns } = arrival;
        let Some(link) = &self.member.links[rank] else { return };
        let (group, flags) = (link.landed(slot).group, link.landed(slot).flags);
        if !self.arrivals.is_free(slot, rank) {
            self.member.fence(rank, format!("a request for microbatch {slot} before the reply to its last one"));
            return;
        }
        let leaves = flags.has(Flags::LEAVE);
        if leaves && group == NO_GROUP {
            let mut reply = Header::default();
            answer(&mut reply, link.landed(slot), self.member.rank);
            let now_ns = self.member.clock.now_ns();
            reply.stamps = stamps(received_ns, now_ns, now_ns);
            self.arrivals.left(slot, rank);
            if let Err(error) = self.member.send(rank, &mut reply) {
                self.member.fence(rank, error.to_string());
            }
            return;
        }
        self.arrivals.arrived(slot, rank, group, leaves, received_ns);
        self.requests[usize::from(slot) * self.member.peers + rank] = Some(received_ns);
    }

    /// The oldest batch that the policy allows now, if there is one. Makes no progress by itself.
    pub fn try_next_batch(&mut self, policy: Policy) -> Option<Batch> {
        self.release(policy, None, |_| true)
    }

    /// As [`FfnMesh::try_next_batch`], of the microbatches that `wanted` names; what waits of others goes on waiting.
    pub fn try_next_batch_of(&mut self, policy: Policy, wanted: impl Fn(u16) -> bool) -> Option<Batch> {
        self.release(policy, None, wanted)
    }

    /// Requests that have arrived so far.
    pub fn arrived(&self) -> u64 {
        self.arrivals.count()
    }

    /// At a time that the caller may know.
    fn release(&mut self, policy: Policy, now_ns: Option<u64>, wanted: impl Fn(u16) -> bool) -> Option<Batch> {
        if !self.arrivals.is_waited_on() {
            return None;
        }
        let now_ns = now_ns.unwrap_or_else(|| self.member.clock.now_ns());
        let released = self.arrivals.release(policy, now_ns, wanted, &mut self.released)?;
        let mut segments = self.spare.pop().unwrap_or_default();
        for &rank in &self.released {
            let seat = usize::from(released.slot) * self.member.peers + rank;
            let (request, idle) = (self.requests[seat].take(), self.idle[seat].take());
            if let Some(received_ns) = request
                && let Some(link) = &mut self.member.links[rank]
                && let idle = idle.filter(|segment| Arc::ptr_eq(&segment.0.in_use, &link.in_use))
                && let Some(mut segment) =
                    idle.or_else(|| Segment::new(link, &self.member.options.layout, released.slot, rank))
            {
                link.take_landed(released.slot, &mut segment.0.header);
                (segment.0.received_ns, segment.0.handed_out_ns) = (received_ns, now_ns);
                segments.push(segment);
            }
        }
        Some(Batch { microbatch: released.slot, group: released.group, segments })
    }

    /// The next batch; none when `timeout` has passed, or earlier when an event wants to be looked at.
    pub fn next_batch(&mut self, policy: Policy, timeout: Duration) -> Result<Option<Batch>, MeshError> {
        let mut patience = Patience::new(timeout);
        loop {
            self.poll()?;
            if let Some(batch) = self.release(policy, self.member.arrived_ns, |_| true) {
                return Ok(Some(batch));
            }
            if !self.member.events.is_empty() {
                return Ok(None);
            }
            let Some(left) = patience.left(&self.member.clock) else { return Ok(None) };
            self.member.sleep_for(self.until_release(policy).map_or(left, |release| release.min(left)))?;
        }
    }

    /// Sends every segment's reply. Segments whose attention instance is gone are dropped: its loss is an event.
    pub fn respond(&mut self, mut batch: Batch) -> Result<(), MeshError> {
        let now_ns = self.member.clock.now_ns();
        for mut segment in batch.segments.drain(..) {
            let Seat { rank, header, received_ns, handed_out_ns, reply, failure, in_use, .. } = &mut *segment.0;
            let link = self.member.links.get(*rank).and_then(Option::as_ref);
            if !link.is_some_and(|link| Arc::ptr_eq(&link.in_use, in_use)) {
                continue;
            }
            let (rank, slot) = (*rank, header.slot);
            self.arrivals.answered(slot, rank);
            let failure = failure.take();
            if failure.is_some() {
                reply.clear_parts();
            }
            answer(reply, header, self.member.rank);
            reply.stamps = stamps(*received_ns, *handed_out_ns, now_ns);
            if let Some(reason) = failure {
                reply.flags = reply.flags.with(Flags::FAILED);
                reply.app = reason;
            }
            let sent = self.member.send(rank, reply);
            reply.clear_parts();
            match sent {
                Ok(()) => self.idle[usize::from(slot) * self.member.peers + rank] = Some(segment),
                Err(error) => self.member.fence(rank, error.to_string()),
            }
        }
        self.spare.push(batch.segments);
        Ok(())
    }

    /// Sleeps until something may have happened; returns early when woken.
    pub fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
        self.member.sleep(deadline)
    }

    /// Waits until the whole deployment is there.
    pub fn wait_complete(&mut self, timeout: Duration) -> Result<(), MeshError> {
        let deadline = self.member.clock.after(timeout);
        loop {
            self.poll()?;
            if let Some(completed) = self.member.completed() {
                return completed;
            }
            if self.member.clock.now() >= deadline {
                return Err(MeshError::Timeout(timeout));
            }
            self.member.sleep(deadline)?;
        }
    }
}

/// Makes `reply` the answer to a request; its parts are as they are.
fn answer(reply: &mut Header, request: &Header, rank: Option<u32>) {
    reply.slot = request.slot;
    reply.source = rank.unwrap_or_default() as u16;
    reply.flags = Flags::REPLY;
    reply.group = request.group;
    reply.app = request.app;
}

fn stamps(received_ns: u64, handed_out_ns: u64, now_ns: u64) -> Stamps {
    let since = |at_ns: u64| u32::try_from(at_ns.saturating_sub(received_ns)).unwrap_or(u32::MAX);
    Stamps { posted_ns: now_ns, received_ns, process_ns: since(handed_out_ns), respond_ns: since(now_ns) }
}
