//! The attention side with a progress thread: the verbs of [`AttentionMesh`], from the application's thread.

use super::progress::{Driver, ProgressOptions, ProgressThread, Turn};
use super::standing::Standing;
use crate::attention::not_linked;
use crate::layout::SlotLayout;
use crate::send::SendSlots;
use crate::sync::{ArrayQueue, AtomicU32};
use crate::{AttentionMesh, MeshError, MeshEvent, Replies, Request, SendBuffer, Ticket, TicketStatus};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use stepmesh_proto::Header;
use stepmesh_proto::control::from_member;
use stepmesh_transport::{Clock, Waker};

/// Every FFN instance is linked.
const LINKED: u32 = u32::MAX;
/// None is known yet.
const NOT_ADMITTED: u32 = u32::MAX - 1;

/// An attention instance whose transfers a thread of its own drives. One thread at a time uses it; dropping it stops and
/// joins the progress thread.
pub struct AttentionEngine {
    thread: ProgressThread,
    shared: Arc<Shared>,
    layout: Arc<SlotLayout>,
    send_slots: Arc<SendSlots>,
    slots: Vec<Slot>,
    next_ticket: u64,
}

/// The replies to one request, in place and owned: the microbatch cannot be acquired again while they are held.
#[derive(Debug)]
pub struct OwnedReply {
    replies: Replies,
    seat: Arc<Seat>,
}

impl Deref for OwnedReply {
    type Target = Replies;

    fn deref(&self) -> &Replies {
        &self.replies
    }
}

impl Drop for OwnedReply {
    fn drop(&mut self) {
        give_back(&self.seat, self.replies.take());
    }
}

/// A microbatch as the application's thread knows it.
#[derive(Default)]
struct Slot {
    outstanding: Option<Ticket>,
    cancelled: bool,
    outcome: Option<Result<Replies, MeshError>>,
}

/// A microbatch as both threads know it.
type Seat = super::seat::Seat<Replies, MeshError>;

fn give_back(seat: &Seat, mut replies: Replies) {
    replies.reset(0, 0);
    seat.give_back(replies);
}

struct Shared {
    commands: ArrayQueue<Command>,
    seats: Vec<Arc<Seat>>,
    /// `LINKED`, `NOT_ADMITTED`, or the lowest rank that is missing.
    unlinked: AtomicU32,
    standing: Standing,
}

// A boxed request would be an allocation for each transfer.
#[allow(clippy::large_enum_variant)]
enum Command {
    Push { buffer: SendBuffer, header: Header, replies: Replies },
    Cancel(u16),
    Leave(u16),
    Control(Box<from_member::Body>),
}

impl AttentionEngine {
    /// Hands a member over to a progress thread. It may have joined already, or not.
    pub fn start(mesh: AttentionMesh, options: ProgressOptions) -> Result<Self, MeshError> {
        let layout = mesh.member.options.layout.clone();
        let count = layout.microbatches();
        let seat = |slot| Arc::new(Seat::new(Replies::new(slot, layout.clone())));
        let shared = Arc::new(Shared {
            commands: ArrayQueue::new(3 * usize::from(count) + 16),
            seats: (0..count).map(seat).collect(),
            unlinked: AtomicU32::new(NOT_ADMITTED),
            standing: Standing::new(),
        });
        let (send_slots, waker) = (mesh.slots().clone(), mesh.waker());
        let flights = (0..count).map(|_| Flight::default()).collect();
        let driver = AttentionDriver { mesh, shared: shared.clone(), flights };
        let thread = ProgressThread::spawn(options, waker, driver)?;
        let slots = (0..count).map(|_| Slot::default()).collect();
        Ok(Self { thread, shared, layout, send_slots, slots, next_ticket: 0 })
    }

    /// This instance's rank, once admitted.
    pub fn rank(&self) -> Option<u32> {
        self.shared.standing.rank()
    }

    /// FFN instances of the deployment, once admitted.
    pub fn ffn(&self) -> usize {
        self.shared.standing.peers()
    }

    /// All ranks are held and all links are up.
    pub fn is_complete(&self) -> bool {
        self.shared.standing.is_complete()
    }

    /// Every FFN instance is linked: transfers are possible now.
    pub fn is_linked(&self) -> bool {
        self.check_linked().is_ok()
    }

    /// The next thing that happened besides replies.
    pub fn next_event(&mut self) -> Option<MeshEvent> {
        self.shared.standing.next_event()
    }

    /// Sends the application's message to the scheduler; if its session is over an event says so.
    pub fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        self.command(Command::Control(Box::new(body)))
    }

    fn seat(&self, microbatch: u16) -> Result<&Arc<Seat>, MeshError> {
        let microbatches = self.slots.len() as u16;
        let seat = self.shared.seats.get(usize::from(microbatch));
        seat.ok_or(MeshError::NoMicrobatch { slot: microbatch, microbatches })
    }

    fn check_linked(&self) -> Result<(), MeshError> {
        match self.shared.unlinked.load(Ordering::Acquire) {
            LINKED => Ok(()),
            NOT_ADMITTED => Err(not_linked(None)),
            rank => Err(not_linked(Some(rank as usize))),
        }
    }

    /// Whether a transfer may be started: the thread runs, everybody is linked, nothing of the slot is in use.
    fn check_free(&mut self, microbatch: u16) -> Result<(), MeshError> {
        self.seat(microbatch)?;
        self.thread.check()?;
        self.check_linked()?;
        self.take_in(microbatch);
        let slot = &mut self.slots[usize::from(microbatch)];
        if slot.cancelled
            && let Some(outcome) = slot.outcome.take()
        {
            (slot.cancelled, slot.outstanding) = (false, None);
            if let Ok(replies) = outcome {
                give_back(&self.shared.seats[usize::from(microbatch)], replies);
            }
        }
        let seat = &self.shared.seats[usize::from(microbatch)];
        let free = self.slots[usize::from(microbatch)].outstanding.is_none() && seat.is_free();
        if free { Ok(()) } else { Err(MeshError::WouldBlock(microbatch)) }
    }

    /// The send slot of a microbatch, to be filled in place. `WouldBlock` while an earlier transfer of it is under way
    /// or not waited for, or its reply is held; `NotLinked` while an FFN instance is missing.
    pub fn acquire(&mut self, microbatch: u16) -> Result<SendBuffer, MeshError> {
        self.check_free(microbatch)?;
        self.send_slots.claim(microbatch)
    }

    /// Sends the request to every FFN instance and returns the ticket for all their replies. A link that is lost on the
    /// way to the progress thread fails the ticket with `NotLinked`.
    pub fn push_pull(&mut self, buffer: SendBuffer, request: Request<'_>) -> Result<Ticket, MeshError> {
        if !buffer.is_of(&self.send_slots) {
            return Err(MeshError::Transfer("the send buffer is another mesh's".into()));
        }
        let header = request.header(&self.layout)?;
        let microbatch = buffer.microbatch();
        self.check_free(microbatch)?;
        let seat = self.seat(microbatch)?;
        let replies = seat.begin().ok_or(MeshError::WouldBlock(microbatch))?;
        self.next_ticket += 1;
        let ticket = Ticket { slot: microbatch, number: self.next_ticket };
        self.slots[usize::from(microbatch)].outstanding = Some(ticket);
        self.command(Command::Push { buffer, header, replies })?;
        Ok(ticket)
    }

    /// Tells the FFN instances not to wait for this instance on a microbatch until its next request. Takes the slot for
    /// one round trip; waits for the links if one is lost meanwhile.
    pub fn leave(&mut self, microbatch: u16) -> Result<(), MeshError> {
        self.check_free(microbatch)?;
        if self.send_slots.is_filling(microbatch) {
            return Err(MeshError::WouldBlock(microbatch));
        }
        self.seat(microbatch)?.take();
        self.command(Command::Leave(microbatch))
    }

    /// Whether [`AttentionEngine::wait`] would not wait: the replies are here, or never will be.
    pub fn is_over(&mut self, ticket: Ticket) -> bool {
        let outstanding = self.is_outstanding(ticket);
        if outstanding {
            self.take_in(ticket.slot);
        }
        !outstanding || self.slots[usize::from(ticket.slot)].outcome.is_some()
    }

    /// Waits for all replies. An expired wait leaves the ticket outstanding: wait again, or cancel.
    pub fn wait(&mut self, ticket: Ticket, timeout: Duration) -> Result<OwnedReply, MeshError> {
        if !self.is_outstanding(ticket) {
            return Err(MeshError::UnknownTicket(ticket.number));
        }
        let seat = self.seat(ticket.slot)?.clone();
        let slot = &mut self.slots[usize::from(ticket.slot)];
        let arrived = || slot.outcome.take().or_else(|| seat.outcome());
        let outcome = self.thread.wait_for(Clock::system().after(timeout), arrived)?;
        let outcome = outcome.ok_or(MeshError::Timeout(timeout))?;
        *slot = Slot::default();
        outcome.map(|replies| OwnedReply { replies, seat })
    }

    /// Gives a ticket up, as [`AttentionMesh::cancel`]. It need not be waited for any more; a reply that was faster
    /// counts.
    pub fn cancel(&mut self, ticket: Ticket) -> Result<(), MeshError> {
        if !self.is_outstanding(ticket) {
            return Ok(());
        }
        self.slots[usize::from(ticket.slot)].cancelled = true;
        self.command(Command::Cancel(ticket.slot))
    }

    /// Waits until the whole deployment is there.
    pub fn wait_complete(&mut self, timeout: Duration) -> Result<(), MeshError> {
        let completed = || match self.shared.standing.completed() {
            Some(Ok(())) if !self.is_linked() => None,
            completed => completed,
        };
        self.thread.wait_for(Clock::system().after(timeout), completed)?.ok_or(MeshError::Timeout(timeout))?
    }

    /// Makes the current or next [`AttentionEngine::sleep`] return, from another thread.
    pub fn waker(&self) -> Waker {
        self.thread.waker()
    }

    /// Sleeps until a ticket or an event may be there; may return early.
    pub fn sleep(&mut self, timeout: Duration) {
        self.thread.park(timeout);
    }

    fn is_outstanding(&self, ticket: Ticket) -> bool {
        self.slots.get(usize::from(ticket.slot)).is_some_and(|slot| slot.outstanding == Some(ticket))
    }

    /// Takes in how the slot's transfer ended, if it has.
    fn take_in(&mut self, microbatch: u16) {
        let (slot, seat) = (&mut self.slots[usize::from(microbatch)], &self.shared.seats[usize::from(microbatch)]);
        if slot.outcome.is_none() {
            slot.outcome = seat.outcome();
        }
    }

    fn command(&mut self, command: Command) -> Result<(), MeshError> {
        self.thread.send(&self.shared.commands, command)
    }
}

/// A microbatch as the progress thread knows it.
#[derive(Default)]
struct Flight {
    under_way: Option<(Ticket, Replies)>,
    leaving: bool,
    /// The application's thread has not been told that the slot is free again.
    owed: bool,
}

struct AttentionDriver {
    mesh: AttentionMesh,
    shared: Arc<Shared>,
    flights: Vec<Flight>,
}

impl AttentionDriver {
    fn carry_out(&mut self, command: Command) -> Turn {
        match command {
            Command::Push { buffer, mut header, replies } => {
                let microbatch = buffer.microbatch();
                let flight = &mut self.flights[usize::from(microbatch)];
                flight.owed = true;
                match self.mesh.push(buffer, &mut header) {
                    Ok(ticket) => flight.under_way = Some((ticket, replies)),
                    Err(error) => {
                        self.finish(microbatch, replies, Err(error));
                        return Turn::Produced;
                    }
                }
            }
            Command::Cancel(slot) => {
                if let Some((ticket, _)) = &self.flights[usize::from(slot)].under_way {
                    self.mesh.cancel(*ticket);
                }
            }
            Command::Leave(slot) => {
                let flight = &mut self.flights[usize::from(slot)];
                (flight.leaving, flight.owed) = (true, true);
            }
            // The session's end is an event.
            Command::Control(body) => drop(self.mesh.send_control(*body)),
        }
        Turn::Worked
    }

    /// Tells the application's thread how a transfer ended.
    fn finish(&mut self, microbatch: u16, replies: Replies, outcome: Result<(), MeshError>) {
        let seat = &self.shared.seats[usize::from(microbatch)];
        self.flights[usize::from(microbatch)].settle(&self.mesh, microbatch, seat);
        let outcome = match outcome {
            Ok(()) => Ok(replies),
            Err(error) => {
                give_back(seat, replies);
                Err(error)
            }
        };
        seat.end(outcome);
    }

    /// Looks after one microbatch.
    fn tend(&mut self, microbatch: u16) -> Turn {
        let flight = &mut self.flights[usize::from(microbatch)];
        let over = |(ticket, _): &mut (Ticket, Replies)| self.mesh.status(*ticket) != TicketStatus::Pending;
        if let Some((ticket, mut replies)) = flight.under_way.take_if(over) {
            let outcome = self.mesh.take_owned(ticket, &mut replies);
            self.finish(microbatch, replies, outcome);
            return Turn::Produced;
        }
        if flight.leaving && self.mesh.leave(microbatch).is_ok() {
            flight.leaving = false;
        }
        flight.settle(&self.mesh, microbatch, &self.shared.seats[usize::from(microbatch)])
    }
}

impl Flight {
    /// Says that the slot is free if it is and that was not said yet.
    fn settle(&mut self, mesh: &AttentionMesh, microbatch: u16, seat: &Seat) -> Turn {
        let is_free = self.owed && self.under_way.is_none() && !self.leaving && mesh.is_free(microbatch);
        if is_free {
            self.owed = false;
            seat.vacate();
        }
        if is_free { Turn::Produced } else { Turn::Idle }
    }
}

impl Driver for AttentionDriver {
    fn turn(&mut self) -> Result<Turn, MeshError> {
        let mut turn = Turn::Idle;
        while let Some(command) = self.shared.commands.pop() {
            turn = turn.max(self.carry_out(command));
        }
        self.mesh.poll()?;
        for microbatch in 0..self.flights.len() {
            turn = turn.max(self.tend(microbatch as u16));
        }
        let unlinked = self.mesh.unlinked();
        let unlinked = unlinked.map_or(LINKED, |rank| rank.map_or(NOT_ADMITTED, |rank| rank as u32));
        self.shared.unlinked.store(unlinked, Ordering::Release);
        Ok(turn.max(self.shared.standing.publish(&mut self.mesh.member)))
    }

    fn has_commands(&self) -> bool {
        !self.shared.commands.is_empty()
    }

    fn sleep(&mut self) -> Result<(), MeshError> {
        let deadline = self.mesh.clock().now() + Duration::from_secs(1);
        self.mesh.sleep(deadline)
    }
}
