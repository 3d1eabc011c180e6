//! The attention side with a progress thread: the verbs of [`AttentionMesh`], from the application's thread.

use super::engine::{Driven, Engine, ProgressOptions};
use crate::member::Member;
use crate::{AttentionMesh, MeshError, MeshEvent, Replies, Request, SendBuffer, Ticket, TicketStatus};
use crossbeam_queue::ArrayQueue;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;
use stepmesh_proto::control::from_member;
use stepmesh_transport::Waker;

/// An attention instance whose transfers go on while the application computes. One thread at a time uses it; dropping it stops
/// and joins the progress thread.
pub struct AttentionEngine {
    engine: Engine<AttentionMesh>,
    seats: Vec<Arc<Seat>>,
}

/// What takes the replies of a microbatch: here while nobody reads any.
type Seat = ArrayQueue<Replies>;

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
        let mut replies = self.replies.take();
        replies.let_go();
        let _ = self.seat.push(replies);
    }
}

impl Driven for AttentionMesh {
    fn member(&mut self) -> &mut Member {
        &mut self.member
    }

    fn poll(&mut self) -> Result<(), MeshError> {
        self.poll()
    }

    fn arrived(&self) -> u64 {
        self.replied()
    }
}

impl AttentionEngine {
    /// Gives a member a progress thread. It may have joined already, or not.
    pub fn start(mesh: AttentionMesh, options: ProgressOptions) -> Result<Self, MeshError> {
        let layout = mesh.member.options.layout.clone();
        let seat = |slot| {
            let seat = Seat::new(1);
            let _ = seat.push(Replies::new(slot, layout.clone()));
            Arc::new(seat)
        };
        let seats = (0..layout.microbatches()).map(seat).collect();
        Ok(Self { engine: Engine::start(mesh, options)?, seats })
    }

    /// This instance's rank, once admitted.
    pub fn rank(&self) -> Option<u32> {
        self.engine.peek(|mesh| mesh.rank()).flatten()
    }

    /// FFN instances of the deployment, once admitted.
    pub fn ffn(&self) -> usize {
        self.engine.peek(|mesh| mesh.ffn()).unwrap_or_default()
    }

    /// All ranks are held and all links are up.
    pub fn is_complete(&self) -> bool {
        self.engine.peek(|mesh| mesh.is_complete()).unwrap_or_default()
    }

    /// Every FFN instance is linked: transfers are possible now.
    pub fn is_linked(&self) -> bool {
        self.engine.peek(|mesh| mesh.is_linked()).unwrap_or_default()
    }

    /// The next thing that happened besides replies.
    pub fn next_event(&mut self) -> Option<MeshEvent> {
        self.engine.peek(AttentionMesh::next_event).flatten()
    }

    /// Sends the application's message to the scheduler.
    pub fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        self.engine.with(|mesh| mesh.send_control(body))
    }

    /// Whether no reply of a microbatch is held.
    fn check_seat(&self, microbatch: u16) -> Result<(), MeshError> {
        let microbatches = self.seats.len() as u16;
        match self.seats.get(usize::from(microbatch)) {
            None => Err(MeshError::NoMicrobatch { slot: microbatch, microbatches }),
            Some(seat) if seat.is_empty() => Err(MeshError::WouldBlock(microbatch)),
            Some(_) => Ok(()),
        }
    }

    /// The send slot of a microbatch, to be filled in place. `WouldBlock` while an earlier transfer of it is under way
    /// or not waited for, or its reply is held; `NotLinked` while an FFN instance is missing.
    pub fn acquire(&mut self, microbatch: u16) -> Result<SendBuffer, MeshError> {
        self.check_seat(microbatch)?;
        self.engine.attempt(|mesh| mesh.acquire(microbatch))
    }

    /// Sends the request to every FFN instance and returns the ticket for all their replies.
    pub fn push_pull(&mut self, buffer: SendBuffer, request: Request<'_>) -> Result<Ticket, MeshError> {
        self.engine.with(|mesh| mesh.push_pull(buffer, request))
    }

    /// Tells the FFN instances not to wait for this instance on a microbatch until its next request, as
    /// [`AttentionMesh::leave`].
    pub fn leave(&mut self, microbatch: u16) -> Result<(), MeshError> {
        self.check_seat(microbatch)?;
        self.engine.attempt(|mesh| mesh.leave(microbatch))
    }

    /// Whether [`AttentionEngine::wait`] would not wait: the replies are here, or never will be. Makes progress.
    pub fn is_over(&mut self, ticket: Ticket) -> bool {
        let is_over = |mesh: &mut AttentionMesh| mesh.status(ticket) != TicketStatus::Pending;
        let waited = self.engine.wait_for(Duration::ZERO, |mesh| is_over(mesh).then_some(()), |_| None);
        !matches!(waited, Ok(None))
    }

    /// Waits for all replies. An expired wait leaves the ticket outstanding: wait again, or cancel.
    pub fn wait(&mut self, ticket: Ticket, timeout: Duration) -> Result<OwnedReply, MeshError> {
        let seat = self.seats.get(usize::from(ticket.slot)).ok_or(MeshError::UnknownTicket(ticket.number))?;
        let take = |mesh: &mut AttentionMesh| {
            if mesh.is_pending(ticket) {
                return None;
            }
            let Some(mut replies) = seat.pop() else { return Some(Err(MeshError::UnknownTicket(ticket.number))) };
            Some(match mesh.take_owned(ticket, &mut replies) {
                Ok(()) => Ok(OwnedReply { replies, seat: seat.clone() }),
                Err(error) => {
                    let _ = seat.push(replies);
                    Err(error)
                }
            })
        };
        self.engine.wait_for(timeout, take, |_| None)?.ok_or(MeshError::Timeout(timeout))?
    }

    /// Gives a ticket up, as [`AttentionMesh::cancel`]. It need not be waited for any more; a reply that was faster
    /// counts.
    pub fn cancel(&mut self, ticket: Ticket) -> Result<(), MeshError> {
        self.engine.with(|mesh| {
            mesh.cancel(ticket);
            Ok(())
        })
    }

    /// Waits until the whole deployment is there.
    pub fn wait_complete(&mut self, timeout: Duration) -> Result<(), MeshError> {
        let completed = |mesh: &mut AttentionMesh| match mesh.member.completed() {
            Some(Ok(())) if !mesh.is_linked() => None,
            completed => completed,
        };
        self.engine.wait_for(timeout, completed, |_| None)?.ok_or(MeshError::Timeout(timeout))?
    }

    /// Makes the current or next [`AttentionEngine::sleep`] return, from another thread.
    pub fn waker(&self) -> Waker {
        self.engine.waker()
    }

    /// Sleeps until a ticket or an event may be there; may return early.
    pub fn sleep(&mut self, timeout: Duration) -> Result<(), MeshError> {
        self.engine.sleep(timeout)
    }
}
