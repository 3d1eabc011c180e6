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

/// The attention side of a step.
pub struct AttentionStep {
    gates: Arc<dyn GateSet>,
    transfers: Vec<Transfer>,
    /// The first that was not announced: they are in the order in which the stream comes to them.
    next: usize,
    /// By microbatch: the transfer under way.
    under_way: Vec<Option<(usize, Ticket)>>,
    done: usize,
}

impl AttentionStep {
    /// A step of these transfers, in the order in which the stream announces them.
    ///
    /// # Errors
    /// [`MeshError::Transfer`] if there are fewer gates than transfers, or no transfer.
    pub fn new(gates: Arc<dyn GateSet>, transfers: Vec<Transfer>) -> Result<Self, MeshError> {
        check(&*gates, &transfers)?;
        let slots = transfers.iter().map(|transfer| usize::from(transfer.microbatch) + 1).max().unwrap_or_default();
        Ok(Self { gates, transfers, next: 0, under_way: vec![None; slots], done: 0 })
    }

    /// What a transfer says of its tensors: their rows may differ from step to step.
    pub fn parts_mut(&mut self, transfer: usize) -> Option<&mut Vec<Part>> {
        self.transfers.get_mut(transfer).map(|transfer| &mut transfer.parts)
    }

    /// Moves the descriptors of one replay, which was or will be launched, until the last gate is open.
    ///
    /// # Errors
    /// [`MeshError::Timeout`], a lost peer, a failed transfer, or a stream that announces a microbatch again before it has
    /// passed its gate: the replay is given up then, and its tickets are cancelled.
    pub fn run(&mut self, mesh: &mut AttentionMesh, timeout: Duration) -> Result<(), MeshError> {
        begin(&*self.gates)?;
        (self.next, self.done) = (0, 0);
        let deadline = Clock::system().after(timeout);
        let outcome = self.until_done(mesh, deadline, timeout);
        if outcome.is_err() {
            self.gates.abort();
            self.under_way.iter_mut().filter_map(Option::take).for_each(|(_, ticket)| mesh.cancel(ticket));
        }
        outcome
    }

    fn until_done(&mut self, mesh: &mut AttentionMesh, deadline: Instant, timeout: Duration) -> Result<(), MeshError> {
        let mut polls = 0;
        while self.done < self.transfers.len() {
            mesh.poll()?;
            self.push(mesh)?;
            self.pull(mesh)?;
            pause(&mut polls, deadline, timeout)?;
        }
        Ok(())
    }

    /// Sends what the stream has announced.
    fn push(&mut self, mesh: &mut AttentionMesh) -> Result<(), MeshError> {
        while let Some(transfer) = self.transfers.get(self.next)
            && self.gates.take(self.next)
        {
            let buffer = mesh.acquire(transfer.microbatch)?;
            let Transfer { group, app, ref parts, .. } = *transfer;
            let ticket = mesh.push_pull(buffer, Request { group, app, parts, leave: false })?;
            self.under_way[usize::from(transfer.microbatch)] = Some((self.next, ticket));
            self.next += 1;
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
    /// Ends the step.
    fn arrived(&mut self, transfer: usize, batch: &Batch) -> Result<(), MeshError>;

    /// The stream has produced a segment's reply: says which parts of it are in use.
    ///
    /// # Errors
    /// Ends the step.
    fn answer(&mut self, transfer: usize, segment: &mut Segment) -> Result<(), MeshError>;
}

/// The FFN side of a step: a fixed order of transfers, each of all attention instances ([`Policy::All`]).
pub struct FfnStep {
    gates: Arc<dyn GateSet>,
    transfers: Vec<Transfer>,
    /// The first whose requests have not come, of each microbatch.
    expected: Vec<usize>,
    /// What the stream works on.
    batches: Vec<Option<Batch>>,
    arrived: usize,
    done: usize,
}

impl FfnStep {
    /// A step of these transfers, in the order in which the stream passes their gates; of each only microbatch and group count.
    ///
    /// # Errors
    /// [`MeshError::Transfer`] if there are fewer gates than transfers, or no transfer.
    pub fn new(gates: Arc<dyn GateSet>, transfers: Vec<Transfer>) -> Result<Self, MeshError> {
        check(&*gates, &transfers)?;
        let batches = transfers.iter().map(|_| None).collect();
        Ok(Self { gates, transfers, expected: Vec::new(), batches, arrived: 0, done: 0 })
    }

    /// Moves the descriptors of one replay, which was or will be launched; false if no request has come within `timeout`: the
    /// replay then still waits at its first gate.
    ///
    /// # Errors
    /// As for [`AttentionStep::run`], and [`MeshError::Transfer`] for a request that is not the next of its microbatch. The stream
    /// may write the replies to requests that were not answered until it is idle, so they are answered, as failed, when the next
    /// replay begins.
    pub fn run(&mut self, mesh: &mut FfnMesh, work: &mut impl FfnWork, timeout: Duration) -> Result<bool, MeshError> {
        begin(&*self.gates)?;
        for mut batch in self.batches.iter_mut().filter_map(Option::take) {
            batch.segments.iter_mut().for_each(|segment| segment.fail("step given up"));
            mesh.respond(batch)?;
        }
        (self.arrived, self.done) = (0, 0);
        let slots = self.transfers.iter().map(|transfer| usize::from(transfer.microbatch) + 1).max();
        self.expected = (0..slots.unwrap_or_default()).map(|slot| self.of_microbatch(slot, 0)).collect();
        let deadline = Clock::system().after(timeout);
        match self.until_done(mesh, work, deadline, timeout) {
            Err(MeshError::Timeout(_)) if self.arrived == 0 => Ok(false),
            Err(error) => {
                self.gates.abort();
                Err(error)
            }
            Ok(()) => Ok(true),
        }
    }

    fn until_done(
        &mut self,
        mesh: &mut FfnMesh,
        work: &mut impl FfnWork,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<(), MeshError> {
        let mut polls = 0;
        while self.done < self.transfers.len() {
            mesh.poll()?;
            while let Some(batch) = mesh.try_next_batch(Policy::All) {
                self.arrive(mesh, batch, work)?;
            }
            self.answer(mesh, work)?;
            pause(&mut polls, deadline, timeout)?;
        }
        Ok(())
    }

    /// The first transfer of a microbatch that is not before `from`.
    fn of_microbatch(&self, microbatch: usize, from: usize) -> usize {
        let is_of = |transfer: &Transfer| usize::from(transfer.microbatch) == microbatch;
        self.transfers[from..].iter().position(is_of).map_or(self.transfers.len(), |at| from + at)
    }

    fn arrive(&mut self, mesh: &mut FfnMesh, mut batch: Batch, work: &mut impl FfnWork) -> Result<(), MeshError> {
        let microbatch = usize::from(batch.microbatch);
        let next = self.expected.get(microbatch).copied().unwrap_or(self.transfers.len());
        if self.transfers.get(next).is_none_or(|transfer| transfer.group != batch.group) {
            let expected = self.transfers.get(next).map_or("none".into(), |transfer| transfer.group.to_string());
            let group = batch.group;
            batch.segments.iter_mut().for_each(|segment| segment.fail("out of step"));
            mesh.respond(batch)?;
            let what = format!("group {group} of microbatch {microbatch} came, the step's next is {expected}");
            return Err(MeshError::Transfer(what));
        }
        work.arrived(next, &batch)?;
        self.expected[microbatch] = self.of_microbatch(microbatch, next + 1);
        self.batches[next] = Some(batch);
        self.arrived += 1;
        self.gates.open(next);
        Ok(())
    }

    /// Sends what the stream has produced.
    fn answer(&mut self, mesh: &mut FfnMesh, work: &mut impl FfnWork) -> Result<(), MeshError> {
        // The stream takes them in order.
        while self.batches.get(self.done).is_some_and(Option::is_some) && self.gates.take(self.done) {
            let Some(mut batch) = self.batches[self.done].take() else { break };
            batch.segments.iter_mut().try_for_each(|segment| work.answer(self.done, segment))?;
            mesh.respond(batch)?;
            self.done += 1;
        }
        Ok(())
    }
}

fn check(gates: &dyn GateSet, transfers: &[Transfer]) -> Result<(), MeshError> {
    if transfers.is_empty() || transfers.len() > gates.len() {
        let (transfers, gates) = (transfers.len(), gates.len());
        return Err(MeshError::Transfer(format!("a step of {transfers} transfers with {gates} gates: one for each")));
    }
    Ok(())
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
