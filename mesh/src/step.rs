//! A whole step as one piece of work of a GPU: captured once with a gate for each transfer, launched once a step. The CPU only
//! moves descriptors: it takes what the stream announces, sends it, and opens the gate when the answer is there.
//!
//! ```text
//!   stream (a graph)                     CPU, on each side
//!   layer 0, microbatch 0 … announce 0   AttentionStep: gate i is announced: push_pull transfer i
//!   layer 0, microbatch 1 … announce 1                  its replies are here: open gate i
//!   pass 0, layer 1, microbatch 0 …      FfnStep:       the batch of transfer i is here: open gate i
//!                                                       gate i is announced: respond
//! ```
//!
//! A step ends whole or not at all: when a peer is lost, a transfer fails or the time is up, all gates open, the replay's
//! results are worth nothing, and whoever launched it closes the gates before the next ([`GateSet`]).

use crate::{AttentionMesh, Batch, FfnMesh, MeshError, Policy, Request, Segment, Ticket, TicketStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_proto::Part;
use stepmesh_transport::{Clock, GateSet};

/// Polls between two looks at the clock, after which a thread whose CPU others need gives it up.
const POLLS: u32 = 64;

/// One transfer of a step. Its gate has its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The microbatch, whose slot it uses.
    pub microbatch: u16,
    /// The layer.
    pub group: u32,
    /// What the request says of its tensors.
    pub parts: Vec<Part>,
    /// For the other side's application.
    pub app: [u8; 16],
}

/// The transfers of each microbatch in their order, and which of them is next.
struct Order {
    microbatches: Vec<u16>,
    next: Vec<Option<usize>>,
}

impl Order {
    /// # Errors
    /// [`MeshError::Transfer`] if there are fewer gates than transfers, or no transfer.
    fn new(gates: &dyn GateSet, microbatches: Vec<u16>) -> Result<Self, MeshError> {
        if microbatches.is_empty() || microbatches.len() > gates.len() {
            let (transfers, gates) = (microbatches.len(), gates.len());
            return Err(MeshError::Transfer(format!(
                "a step of {transfers} transfers with {gates} gates: one for each"
            )));
        }
        let slots = microbatches.iter().map(|microbatch| usize::from(*microbatch) + 1).max().unwrap_or_default();
        Ok(Self { microbatches, next: vec![None; slots] })
    }

    fn restart(&mut self) {
        (0..self.next.len()).for_each(|slot| self.next[slot] = self.first(slot, 0));
    }

    /// The first transfer of a microbatch that is not before `from`.
    fn first(&self, slot: usize, from: usize) -> Option<usize> {
        let is_of = |microbatch: &u16| usize::from(*microbatch) == slot;
        self.microbatches[from..].iter().position(is_of).map(|at| from + at)
    }

    fn next(&self, slot: usize) -> Option<usize> {
        self.next.get(slot).copied().flatten()
    }

    fn advance(&mut self, slot: usize) {
        self.next[slot] = self.next[slot].and_then(|at| self.first(slot, at + 1));
    }
}

/// The attention side of a step.
pub struct AttentionStep {
    gates: Arc<dyn GateSet>,
    transfers: Vec<Transfer>,
    /// What the stream will announce.
    order: Order,
    /// By microbatch: the transfer under way.
    under_way: Vec<Option<(usize, Ticket)>>,
    done: usize,
}

impl AttentionStep {
    /// A step of these transfers, those of a microbatch in the order in which the stream announces them.
    ///
    /// # Errors
    /// [`MeshError::Transfer`] if there are fewer gates than transfers, or no transfer.
    pub fn new(gates: Arc<dyn GateSet>, transfers: Vec<Transfer>) -> Result<Self, MeshError> {
        let order = Order::new(&*gates, transfers.iter().map(|transfer| transfer.microbatch).collect())?;
        let under_way = vec![None; order.next.len()];
        Ok(Self { gates, transfers, order, under_way, done: 0 })
    }

    /// What a transfer says of its tensors: their rows may differ from step to step.
    pub fn parts_mut(&mut self, transfer: usize) -> Option<&mut Vec<Part>> {
        self.transfers.get_mut(transfer).map(|transfer| &mut transfer.parts)
    }

    /// Moves the descriptors of one replay, which was or will be launched, until the last gate is open.
    ///
    /// # Errors
    /// [`MeshError::Timeout`], and those of [`AttentionStep::turn`].
    pub fn run(&mut self, mesh: &mut AttentionMesh, timeout: Duration) -> Result<(), MeshError> {
        self.begin(|transfer| transfer.group)?;
        let (deadline, mut polls) = (Clock::system().after(timeout), 0);
        loop {
            if let Err(error) = mesh.poll().and_then(|()| pause(&mut polls, deadline, timeout)) {
                self.give_up(mesh);
                return Err(error);
            }
            if self.turn(mesh)? {
                return Ok(());
            }
        }
    }

    /// Begins a replay, for one who polls the mesh and takes [turns](AttentionStep::turn). `group` says each transfer's group, in the
    /// order of the transfers: where several attention instances take part, those of a microbatch have to grow from replay to
    /// replay, or an FFN instance would not wait for all of them.
    ///
    /// # Errors
    /// [`MeshError::Transfer`] if the last replay was given up and its gates are not closed.
    pub fn begin(&mut self, mut group: impl FnMut(&Transfer) -> u32) -> Result<(), MeshError> {
        begin(&*self.gates)?;
        self.order.restart();
        self.done = 0;
        self.transfers.iter_mut().for_each(|transfer| transfer.group = group(transfer));
        Ok(())
    }

    /// Moves the descriptors that can be moved now; true when the last gate is open. Does not poll.
    ///
    /// # Errors
    /// A lost peer, a failed transfer, or a stream that announces a microbatch again before it has passed its gate: the replay is
    /// given up then.
    pub fn turn(&mut self, mesh: &mut AttentionMesh) -> Result<bool, MeshError> {
        let moved = self.push(mesh).and_then(|()| self.pull(mesh));
        if let Err(error) = moved {
            self.give_up(mesh);
            return Err(error);
        }
        Ok(self.done == self.transfers.len())
    }

    /// Gives the replay up: every gate opens, tickets are cancelled, and what the stream computes is worth nothing.
    pub fn give_up(&mut self, mesh: &mut AttentionMesh) {
        self.gates.abort();
        self.under_way.iter_mut().filter_map(Option::take).for_each(|(_, ticket)| mesh.cancel(ticket));
    }

    /// Sends what the stream has announced.
    fn push(&mut self, mesh: &mut AttentionMesh) -> Result<(), MeshError> {
        for slot in 0..self.under_way.len() {
            let Some(at) = self.order.next(slot).filter(|at| self.gates.take(*at)) else { continue };
            let Transfer { microbatch, group, app, ref parts } = self.transfers[at];
            let buffer = mesh.acquire(microbatch)?;
            let ticket = mesh.push_pull(buffer, Request { group, app, parts, leave: false })?;
            self.under_way[slot] = Some((at, ticket));
            self.order.advance(slot);
        }
        Ok(())
    }

    /// Opens the gates of what has been answered.
    fn pull(&mut self, mesh: &mut AttentionMesh) -> Result<(), MeshError> {
        for under_way in &mut self.under_way {
            let Some((transfer, ticket)) = *under_way else { continue };
            if mesh.status(ticket) == TicketStatus::Pending {
                continue;
            }
            *under_way = None;
            // The stream reads the replies before it announces this microbatch again, and nobody else does.
            mesh.take(ticket)?;
            self.gates.open(transfer);
            self.done += 1;
        }
        Ok(())
    }
}

/// What an FFN side's application has to say while a step runs.
pub trait FfnWork {
    /// The requests of a transfer are here; its gate opens when this returns. Row counts that kernels read go to where they read
    /// them now.
    ///
    /// # Errors
    /// Fails the requests and ends the step: they are not those that the stream will compute.
    fn arrived(&mut self, transfer: usize, batch: &Batch) -> Result<(), MeshError>;

    /// The stream has produced a segment's reply: says which parts of it are in use.
    ///
    /// # Errors
    /// Ends the step.
    fn answer(&mut self, transfer: usize, segment: &mut Segment) -> Result<(), MeshError>;
}

/// The FFN side of a step: a fixed order of transfers, each of all attention instances ([`Policy::All`]). Requests for other
/// microbatches, and those that come after a microbatch's last, are left for others and for the next replay.
pub struct FfnStep {
    gates: Arc<dyn GateSet>,
    /// What is to come.
    order: Order,
    /// By microbatch: what the stream works on.
    under_way: Vec<Option<(usize, Batch)>>,
    has_begun: bool,
    done: usize,
}

impl FfnStep {
    /// A step of transfers of these microbatches, those of a microbatch in the order in which the stream passes their gates.
    ///
    /// # Errors
    /// [`MeshError::Transfer`] if there are fewer gates than transfers, or no transfer.
    pub fn new(gates: Arc<dyn GateSet>, microbatches: Vec<u16>) -> Result<Self, MeshError> {
        let order = Order::new(&*gates, microbatches)?;
        let under_way = order.next.iter().map(|_| None).collect();
        Ok(Self { gates, order, under_way, has_begun: false, done: 0 })
    }

    /// Moves the descriptors of one replay, which was or will be launched; false if no request has come within `timeout`: the
    /// replay then still waits at its first gate.
    ///
    /// # Errors
    /// [`MeshError::Timeout`], and those of [`FfnStep::turn`].
    pub fn run(&mut self, mesh: &mut FfnMesh, work: &mut impl FfnWork, timeout: Duration) -> Result<bool, MeshError> {
        self.begin(mesh)?;
        let (deadline, mut polls) = (Clock::system().after(timeout), 0);
        loop {
            match mesh.poll().and_then(|()| pause(&mut polls, deadline, timeout)) {
                Err(MeshError::Timeout(_)) if !self.has_begun => return Ok(false),
                Err(error) => {
                    self.give_up();
                    return Err(error);
                }
                Ok(()) => {}
            }
            if self.turn(mesh, work)? {
                return Ok(true);
            }
        }
    }

    /// Begins a replay, for one who polls the mesh and takes [turns](FfnStep::turn). What the last one left unanswered is answered
    /// now, as failed: until its stream was idle, it may have written there.
    ///
    /// # Errors
    /// [`MeshError::Transfer`] if the last replay was given up and its gates are not closed.
    pub fn begin(&mut self, mesh: &mut FfnMesh) -> Result<(), MeshError> {
        begin(&*self.gates)?;
        for (_, batch) in self.under_way.iter_mut().filter_map(Option::take) {
            fail(mesh, batch, "step given up")?;
        }
        (self.has_begun, self.done) = (false, 0);
        self.order.restart();
        Ok(())
    }

    /// Moves the descriptors that can be moved now; true when the last reply is on its way. Does not poll.
    ///
    /// # Errors
    /// As `work` and the mesh say: the replay is given up then.
    pub fn turn(&mut self, mesh: &mut FfnMesh, work: &mut impl FfnWork) -> Result<bool, MeshError> {
        let moved = self.arrive(mesh, work).and_then(|()| self.answer(mesh, work));
        if let Err(error) = moved {
            self.give_up();
            return Err(error);
        }
        Ok(self.done == self.order.microbatches.len())
    }

    /// Gives the replay up: every gate opens, and what the stream computes is worth nothing.
    pub fn give_up(&mut self) {
        self.gates.abort();
    }

    /// Opens the gates of what is here.
    fn arrive(&mut self, mesh: &mut FfnMesh, work: &mut impl FfnWork) -> Result<(), MeshError> {
        for slot in 0..self.under_way.len() {
            let Some(at) = self.order.next(slot).filter(|_| self.under_way[slot].is_none()) else { continue };
            let is_of = |microbatch| usize::from(microbatch) == slot;
            let Some(batch) = mesh.try_next_batch_of(Policy::All, is_of) else { continue };
            if let Err(error) = work.arrived(at, &batch) {
                fail(mesh, batch, "out of step")?;
                return Err(error);
            }
            self.under_way[slot] = Some((at, batch));
            self.has_begun = true;
            self.gates.open(at);
            self.order.advance(slot);
        }
        Ok(())
    }

    /// Sends what the stream has produced.
    fn answer(&mut self, mesh: &mut FfnMesh, work: &mut impl FfnWork) -> Result<(), MeshError> {
        for under_way in &mut self.under_way {
            let Some((at, mut batch)) = under_way.take_if(|(at, _)| self.gates.take(*at)) else { continue };
            batch.segments.iter_mut().try_for_each(|segment| work.answer(at, segment))?;
            mesh.respond(batch)?;
            self.done += 1;
        }
        Ok(())
    }
}

fn fail(mesh: &mut FfnMesh, mut batch: Batch, why: &str) -> Result<(), MeshError> {
    batch.segments.iter_mut().for_each(|segment| segment.fail(why));
    mesh.respond(batch)
}

fn begin(gates: &dyn GateSet) -> Result<(), MeshError> {
    if gates.is_aborted() {
        return Err(MeshError::Transfer("the last replay was given up: close its gates before the next".into()));
    }
    Ok(())
}

/// Between two polls. No event announces a gate, so nobody sleeps.
fn pause(polls: &mut u32, deadline: Instant, timeout: Duration) -> Result<(), MeshError> {
    *polls += 1;
    std::hint::spin_loop();
    if polls.is_multiple_of(POLLS) {
        if Instant::now() >= deadline {
            return Err(MeshError::Timeout(timeout));
        }
        std::thread::yield_now();
    }
    Ok(())
}
