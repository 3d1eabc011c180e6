//! The attention side's thread: rounds over all slots of all members, so many under way at once.

use super::ends::AttentionEnd;
use super::payload::{Ask, Payload, Tensors, echoed};
use crate::BenchError;
use crate::timing::{Measured, Times, measure_all};
use crate::transport::Mode;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use stepmesh_mesh::{Request, Ticket, Trace};

/// What a row's play came to.
pub(super) struct Played {
    pub(super) measured: Measured,
    pub(super) phases: Phases,
    /// Rounds of everything, the warm-up too.
    pub(super) rounds: u64,
}

/// Where the time of a round goes, of rounds that were timed piece by piece.
pub(super) struct Phases {
    /// Acquiring the slot, and filling it.
    pub(super) fill: Times,
    /// Within `push_pull`.
    pub(super) request_post: Times,
    /// From the call of `push_pull` until the FFN side has seen the request.
    pub(super) a2f: Times,
    pub(super) ffn_queue: Times,
    pub(super) ffn_process: Times,
    /// From the call of `respond` until the attention side has seen the reply.
    pub(super) f2a: Times,
    /// From then until `wait` has returned.
    pub(super) wake_up: Times,
}

/// One side of a deployment at play.
pub(super) struct Player<'a, A> {
    members: &'a mut [A],
    payload: &'a Payload,
    tensors: Tensors,
    mode: Mode,
    slots: u64,
    /// Under way at once, of all members.
    window: usize,
    under_way: VecDeque<Round>,
    next: u64,
}

struct Round {
    member: usize,
    ticket: Ticket,
    started: Instant,
    filled: Instant,
    pushed: Instant,
}

impl<'a, A: AttentionEnd> Player<'a, A> {
    pub(super) fn new(members: &'a mut [A], payload: &'a Payload, mode: Mode, slots: u16, microbatches: u16) -> Self {
        let window = members.len() * usize::from(microbatches);
        Self {
            tensors: Tensors::new(payload.request(), 1),
            members,
            payload,
            mode,
            slots: u64::from(slots),
            window,
            under_way: VecDeque::with_capacity(window),
            next: 0,
        }
    }

    /// Checks every slot, then plays, then plays some more with a watch on every step.
    pub(super) fn play(mut self, provider: &'static str, budget: Duration) -> Result<Played, BenchError> {
        self.check(provider)?;
        let measured = if self.window == 1 {
            measure_all(budget, || self.round())?
        } else {
            self.overlapped(budget / 4)?;
            self.overlapped(budget)?
        };
        let phases = self.watched(budget / 2)?;
        Ok(Played { measured, phases, rounds: self.next })
    }

    /// Which member, which of its slots, which group comes next. Groups only grow, as layers and steps do.
    fn turn(&mut self) -> (usize, u16, u32) {
        let members = self.members.len() as u64;
        let (member, round) = ((self.next % members) as usize, self.next / members);
        self.next += 1;
        (member, (round % self.slots) as u16, (round / self.slots % u64::from(u32::MAX)) as u32)
    }

    /// One round alone: nothing is timed but by the caller.
    fn round(&mut self) -> Result<(), BenchError> {
        let (member, slot, group) = self.turn();
        let mut buffer = self.members[member].acquire(slot)?;
        if self.mode == Mode::Copy {
            self.tensors.fill(&mut buffer);
        }
        let request =
            Request { group, app: Ask::Reply(self.mode).encode(), parts: self.payload.request(), leave: false };
        let ticket = self.members[member].push_pull(buffer, request)?;
        self.members[member].wait(ticket, |_| ())
    }

    fn push(&mut self, ask: Ask) -> Result<(), BenchError> {
        let (member, slot, group) = self.turn();
        let started = Instant::now();
        let mut buffer = self.members[member].acquire(slot)?;
        if self.mode == Mode::Copy || ask == Ask::Echo {
            self.tensors.fill(&mut buffer);
        }
        let filled = Instant::now();
        let request = Request { group, app: ask.encode(), parts: self.payload.request(), leave: false };
        let ticket = self.members[member].push_pull(buffer, request)?;
        self.under_way.push_back(Round { member, ticket, started, filled, pushed: Instant::now() });
        Ok(())
    }

    /// Waits for the oldest round.
    fn pull<T>(&mut self, look: impl FnOnce(&stepmesh_mesh::Replies) -> T) -> Result<Option<(Round, T)>, BenchError> {
        let Some(round) = self.under_way.pop_front() else { return Ok(None) };
        let seen = self.members[round.member].wait(round.ticket, look)?;
        Ok(Some((round, seen)))
    }

    /// Every slot once: what comes back must be made of what was sent.
    fn check(&mut self, provider: &'static str) -> Result<(), BenchError> {
        let [bytes, _] = self.payload.bytes();
        let hidden = Tensors::new(self.payload.request(), 1);
        let expected: Vec<u8> = hidden.part(0).iter().map(|&byte| echoed(byte)).collect();
        for _ in 0..self.slots as usize * self.members.len() {
            self.push(Ask::Echo)?;
            let intact = self.pull(|replies| {
                (0..replies.ranks()).all(|rank| {
                    let part = replies.part(rank, 0);
                    !part.is_empty() && part.chunks(expected.len()).all(|chunk| chunk == &expected[..chunk.len()])
                })
            })?;
            if !intact.is_some_and(|(_, intact)| intact) {
                return Err(BenchError::Damaged { bytes, provider });
            }
        }
        Ok(())
    }

    fn overlapped(&mut self, budget: Duration) -> Result<Measured, BenchError> {
        let mut singles = Times::new()?;
        let begin = Instant::now();
        let ask = Ask::Reply(self.mode);
        loop {
            while self.under_way.len() < self.window && begin.elapsed() < budget {
                self.push(ask)?;
            }
            match self.pull(|_| ())? {
                Some((round, ())) => singles.record(round.started.elapsed(), 1),
                None => break,
            }
        }
        Ok(Measured { timing: singles.timing(), singles })
    }

    fn watched(&mut self, budget: Duration) -> Result<Phases, BenchError> {
        let mut phases = Phases {
            fill: Times::new()?,
            request_post: Times::new()?,
            a2f: Times::new()?,
            ffn_queue: Times::new()?,
            ffn_process: Times::new()?,
            f2a: Times::new()?,
            wake_up: Times::new()?,
        };
        let begin = Instant::now();
        loop {
            while self.under_way.len() < self.window && begin.elapsed() < budget {
                self.push(Ask::Timed(self.mode))?;
            }
            let slowest = |replies: &stepmesh_mesh::Replies| {
                let traces = (0..replies.ranks()).map(|rank| replies.trace(rank));
                traces.max_by_key(|trace| trace.round_trip_ns).unwrap_or_default()
            };
            match self.pull(slowest)? {
                Some((round, trace)) => phases.add(&round, trace),
                None => return Ok(phases),
            }
        }
    }
}

impl Phases {
    fn add(&mut self, round: &Round, trace: Trace) {
        let nanoseconds = |times: &mut Times, time| times.record(Duration::from_nanos(time), 1);
        nanoseconds(&mut self.a2f, trace.a2f_ns);
        nanoseconds(&mut self.ffn_queue, trace.queue_ns);
        nanoseconds(&mut self.ffn_process, trace.process_ns);
        nanoseconds(&mut self.f2a, trace.f2a_ns);
        self.fill.record(round.filled - round.started, 1);
        self.request_post.record(round.pushed - round.filled, 1);
        self.wake_up.record(round.filled.elapsed().saturating_sub(Duration::from_nanos(trace.round_trip_ns)), 1);
    }
}
