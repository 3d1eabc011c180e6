//! The attention side: `acquire` → `push_pull` → ticket → `wait`.

use crate::control::Control;
use crate::layout::{Direction, SlotLayout};
use crate::link::Stage;
use crate::member::{Arrival, Member, MemberOptions, Patience};
use crate::reply::{Replies, Reply};
use crate::send::{SendBuffer, SendSlots};
use crate::tickets::{Ticket, TicketStatus, Tickets};
use crate::{MeshError, MeshEvent, Role, TicketFailure};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_proto::{Flags, Header, Part, Stamps, control::from_member};
use stepmesh_transport::{Clock, Device, Region, Waker};

/// What a request says besides its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Request<'a> {
    /// Requests of equal microbatch and group may share a batch on the FFN side: the layer. Below `u32::MAX`.
    pub group: u32,
    /// For the FFN side's application.
    pub app: [u8; 16],
    /// The parts in use, in the layout's order. Offsets are filled in by the mesh.
    pub parts: &'a [Part],
    /// The FFN side need not wait for this instance on this microbatch after this request.
    pub leave: bool,
}

impl Request<'_> {
    /// Says this in a fresh header, its parts placed; without what only the mesh knows.
    fn write(&self, layout: &SlotLayout, header: &mut Header) -> Result<(), MeshError> {
        if self.group == NO_GROUP {
            return Err(MeshError::Transfer(format!("group {NO_GROUP} is reserved")));
        }
        header.group = self.group;
        header.app = self.app;
        header.flags = if self.leave { Flags::LEAVE } else { Flags::NONE };
        layout.place(Direction::A2F, self.parts, header)
    }
}

/// The group of a transfer that is no request: its sender leaves.
pub(crate) const NO_GROUP: u32 = u32::MAX;

/// An attention instance in the mesh. Owned and driven by one thread: every call makes progress.
pub struct AttentionMesh {
    pub(crate) member: Member,
    tickets: Tickets,
    slots: Arc<SendSlots>,
    replies: Vec<Replies>,
}

impl AttentionMesh {
    /// Starts to join. [`AttentionMesh::poll`] until [`AttentionMesh::rank`] is known, or use
    /// [`AttentionMesh::wait_complete`].
    pub fn new(
        options: MemberOptions,
        device: Arc<dyn Device>,
        control: Box<dyn Control>,
        clock: Clock,
    ) -> Result<Self, MeshError> {
        let endpoint = device.endpoint()?;
        Self::with_endpoint(options, device, endpoint, control, clock)
    }

    /// As [`AttentionMesh::new`], on an endpoint that exists already (so that the control plane could be given its
    /// waker).
    pub fn with_endpoint(
        options: MemberOptions,
        device: Arc<dyn Device>,
        endpoint: Box<dyn stepmesh_transport::Endpoint>,
        control: Box<dyn Control>,
        clock: Clock,
    ) -> Result<Self, MeshError> {
        let layout = options.layout.clone();
        let slots = layout.microbatches();
        let member = Member::new(Role::Attention, options, device, endpoint, control, clock)?;
        Ok(Self {
            member,
            tickets: Tickets::new(slots, 0),
            slots: SendSlots::new(layout.clone()),
            replies: (0..slots).map(|slot| Replies::new(slot, layout.clone())).collect(),
        })
    }

    /// This instance's rank, once admitted.
    pub fn rank(&self) -> Option<u32> {
        self.member.rank
    }

    /// FFN instances of the deployment, once admitted.
    pub fn ffn(&self) -> usize {
        self.member.peers
    }

    /// All ranks are held and all links are up.
    pub fn is_complete(&self) -> bool {
        self.member.complete
    }

    /// Every FFN instance is linked: transfers are possible now.
    pub fn is_linked(&self) -> bool {
        self.check_linked().is_ok()
    }

    /// Wakes [`AttentionMesh::sleep`] and [`AttentionMesh::wait`] from another thread.
    pub fn waker(&self) -> Waker {
        self.member.waker()
    }

    /// The clock that deadlines are meant by.
    pub fn clock(&self) -> &Clock {
        &self.member.clock
    }

    /// The next thing that happened besides replies.
    pub fn next_event(&mut self) -> Option<MeshEvent> {
        self.member.events.pop_front()
    }

    /// Sends the application's message to the scheduler.
    pub fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        self.member.send_control(body)
    }

    /// Makes progress without blocking.
    pub fn poll(&mut self) -> Result<(), MeshError> {
        self.member.poll()?;
        if self.tickets.peers() != self.member.peers {
            self.tickets = Tickets::new(self.replies.len() as u16, self.member.peers);
            self.member.outbox.iter().for_each(|region| self.slots.settle(region.clone()));
        }
        while let Some(end) = self.member.ended.pop_front() {
            self.tickets.link_ended(end.rank, &TicketFailure::PeerLost { peer: end.peer, reason: end.reason });
        }
        while let Some(arrival) = self.member.arrivals.pop_front() {
            self.land(arrival);
        }
        if !self.member.is_settled {
            self.finish_drains();
        }
        Ok(())
    }

    fn land(&mut self, arrival: Arrival) {
        let Some(link) = self.member.links[arrival.rank].as_mut() else { return };
        let Some(region) = &link.landing else { return };
        let header = link.landed(arrival.slot);
        let failure = header.flags.has(Flags::FAILED).then(|| TicketFailure::PeerFailed {
            peer: link.peer.clone(),
            reason: String::from_utf8_lossy(&header.app).trim_end_matches('\0').to_owned(),
        });
        if self.tickets.replied(arrival.slot, arrival.rank, failure) {
            let header = self.replies[usize::from(arrival.slot)].land(arrival.rank, region, arrival.received_ns);
            link.take_landed(arrival.slot, header);
        } else {
            self.member.fence(arrival.rank, format!("a reply for microbatch {} that was not due", arrival.slot));
        }
    }

    /// Fences the links that were draining and have no other transfer under way, or have had their time.
    fn finish_drains(&mut self) {
        for rank in 0..self.member.links.len() {
            let Some(link) = &self.member.links[rank] else { continue };
            let Stage::Draining(until) = link.stage else { continue };
            if !self.tickets.waits_for(rank) || self.member.clock.now() >= until {
                self.member.fence(rank, "a ticket was cancelled".into());
            }
        }
    }

    fn check_slot(&self, slot: u16) -> Result<(), MeshError> {
        let microbatches = self.replies.len() as u16;
        if slot >= microbatches { Err(MeshError::NoMicrobatch { slot, microbatches }) } else { Ok(()) }
    }

    #[inline]
    fn check_linked(&self) -> Result<(), MeshError> {
        if self.member.is_linked { Ok(()) } else { self.unlinked().map_or(Ok(()), |rank| Err(not_linked(rank))) }
    }

    /// The send slot of a microbatch, to be filled in place. `WouldBlock` while an earlier transfer of it is under way
    /// or not waited for; `NotLinked` while an FFN instance is missing.
    pub fn acquire(&mut self, microbatch: u16) -> Result<SendBuffer, MeshError> {
        self.check_slot(microbatch)?;
        self.check_linked()?;
        if !self.tickets.is_free(microbatch) {
            return Err(MeshError::WouldBlock(microbatch));
        }
        self.slots.claim(microbatch)
    }

    /// Where a request part of a microbatch is produced, for work that is captured ahead ([`crate::AttentionStep`]).
    pub fn request_place(&self, microbatch: u16, part: usize) -> Option<(Region, Range<usize>)> {
        let range = self.member.options.layout.part_range(Direction::A2F, microbatch, part)?;
        Some((self.member.outbox.clone()?, range))
    }

    /// Where a part of an FFN instance's replies for a microbatch lands, as long as the layout allows; for work that is captured
    /// ahead, until the link goes down.
    pub fn reply_place(&self, rank: usize, microbatch: u16, part: usize) -> Option<(Region, Range<usize>)> {
        let link = self.member.links.get(rank)?.as_ref()?;
        Some((link.landing.clone()?, self.member.options.layout.part_range(Direction::F2A, microbatch, part)?))
    }

    /// Sends the request to every FFN instance and returns the ticket for all their replies.
    pub fn push_pull(&mut self, buffer: SendBuffer, request: Request<'_>) -> Result<Ticket, MeshError> {
        if !buffer.is_of(&self.slots) {
            return Err(MeshError::Transfer("the send buffer is another mesh's".into()));
        }
        let mut header = Header::default();
        request.write(&self.member.options.layout, &mut header)?;
        self.check_linked()?;
        self.post(buffer.microbatch(), &mut header);
        Ok(self.tickets.begin(buffer.microbatch()))
    }

    /// Tells the FFN instances not to wait for this instance on a microbatch until its next request. Takes the slot for
    /// one round trip.
    pub fn leave(&mut self, microbatch: u16) -> Result<(), MeshError> {
        self.check_slot(microbatch)?;
        self.check_linked()?;
        if !self.tickets.is_free(microbatch) || self.slots.is_filling(microbatch) {
            return Err(MeshError::WouldBlock(microbatch));
        }
        let mut header = Header::default();
        header.group = NO_GROUP;
        header.flags = Flags::LEAVE;
        self.post(microbatch, &mut header);
        self.tickets.begin_unattended(microbatch);
        Ok(())
    }

    fn post(&mut self, slot: u16, header: &mut Header) {
        header.slot = slot;
        header.source = self.member.rank.unwrap_or_default() as u16;
        let requested_ns = self.member.clock.now_ns();
        header.stamps = Stamps { posted_ns: requested_ns, ..Stamps::default() };
        for rank in 0..self.member.peers {
            if let Err(error) = self.member.send(rank, header) {
                self.member.fence(rank, error.to_string());
            }
        }
        // While the request is on its way; what comes of it is seen by a poll at the earliest.
        self.replies[usize::from(slot)].reset(self.member.peers, requested_ns);
    }

    /// Where a ticket stands; makes no progress by itself.
    pub fn status(&self, ticket: Ticket) -> TicketStatus {
        self.tickets.status(ticket)
    }

    /// Consumes a ticket that is ready or failed. A pending one is a `Timeout` of zero and stays outstanding.
    pub fn take(&mut self, ticket: Ticket) -> Result<Reply<'_>, MeshError> {
        match self.tickets.status(ticket) {
            TicketStatus::Pending => Err(MeshError::Timeout(Duration::ZERO)),
            TicketStatus::Unknown => Err(MeshError::UnknownTicket(ticket.number)),
            TicketStatus::Failed(failure) => {
                self.tickets.consume(ticket);
                Err(failure.into())
            }
            TicketStatus::Ready => {
                self.tickets.consume(ticket);
                Ok(Reply(&self.replies[usize::from(ticket.slot)]))
            }
        }
    }

    /// As [`AttentionMesh::take`] for a ticket that is not pending, with replies that the caller keeps; `replies`, of the
    /// same slot, takes their place here.
    pub(crate) fn take_owned(&mut self, ticket: Ticket, replies: &mut Replies) -> Result<(), MeshError> {
        self.take(ticket)?;
        std::mem::swap(&mut self.replies[usize::from(ticket.slot)], replies);
        Ok(())
    }

    /// Whether a ticket is outstanding.
    pub(crate) fn is_pending(&self, ticket: Ticket) -> bool {
        self.tickets.is_pending(ticket)
    }

    /// Replies that have come, or never will, so far.
    pub(crate) fn replied(&self) -> u64 {
        self.tickets.replies()
    }

    /// The lowest rank that is not linked; `None` within if nobody is known yet.
    fn unlinked(&self) -> Option<Option<usize>> {
        let up = |link: &Option<crate::link::Link>| link.as_ref().is_some_and(|link| link.stage == Stage::Up);
        match self.member.links.iter().position(|link| !up(link)) {
            None if self.member.links.is_empty() => Some(None),
            None => None,
            rank => Some(rank),
        }
    }

    /// Waits for all replies. An expired wait leaves the ticket outstanding: wait again, or cancel.
    pub fn wait(&mut self, ticket: Ticket, timeout: Duration) -> Result<Reply<'_>, MeshError> {
        let mut patience = Patience::new(timeout);
        loop {
            self.poll()?;
            if !self.tickets.is_pending(ticket) {
                return self.take(ticket);
            }
            let Some(left) = patience.left(&self.member.clock) else { return Err(MeshError::Timeout(timeout)) };
            self.member.sleep_for(left)?;
        }
    }

    /// Gives a ticket up: it need not be waited for any more. Its slot is quarantined until the FFN instances that have not replied are fenced off: their
    /// links end once other transfers on them are done (or [`MemberOptions::drain`] has passed) and come back as new
    /// incarnations.
    pub fn cancel(&mut self, ticket: Ticket) {
        for rank in self.tickets.cancel(ticket) {
            self.member.drain(rank);
        }
        self.finish_drains();
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
            match self.member.completed() {
                Some(Ok(())) if !self.is_linked() => {}
                Some(completed) => return completed,
                None => {}
            }
            if self.member.clock.now() >= deadline {
                return Err(MeshError::Timeout(timeout));
            }
            self.member.sleep(deadline)?;
        }
    }
}

pub(crate) fn not_linked(rank: Option<usize>) -> MeshError {
    MeshError::NotLinked(rank.map_or("any FFN instance: not admitted yet".into(), |rank| format!("ffn {rank}")))
}
