//! The requests of a worker: on their way, a slot each, and over, until they are waited for.

use super::copies::{Copies, Piece, rest};
use super::spare::Spare;
use super::{now_ns, parts};
use crate::error::Failure;
use crate::member::{Attention, Landed};
use crate::view::View;
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;
use stepmesh_embed::{Driven, Reply, Request};
use stepmesh_mesh::{MeshError, Request as MeshRequest, SendBuffer, Ticket};

/// Requests that were waited for and are remembered, for their traces: few, so that they stay in the cache.
pub(super) const REMEMBERED: usize = 256;
/// Requests that are over and that nobody has waited for; beyond, the oldest are forgotten.
const UNCLAIMED: usize = 65_536;

/// The eight stamps of a request at one server, in nanoseconds; 2 to 5 are on the server's clock.
pub(super) type Stamps = [u64; 8];

/// A request that is on its way.
pub(super) struct Flight {
    pub(super) stage: Stage,
    pub(super) trip: Trip,
}

/// What stays the same about it.
pub(super) struct Trip {
    pub(super) handlers: u64,
    pub(super) pushes: Vec<View>,
    pub(super) pulls: Vec<View>,
    pub(super) requested_ns: u64,
    pub(super) posted_ns: u64,
    pub(super) copied_bytes: u64,
}

/// How far a request has come. A GPU's tensors take time to be copied, at both ends.
pub(super) enum Stage {
    /// The tensors are being copied to the slot.
    Filling(SendBuffer, Request, usize),
    /// The servers have it.
    UnderWay(Ticket),
    /// The replies are being copied to the tensors that wait for them.
    Emptying(Finished),
}

/// A request that is over.
pub(super) struct Finished {
    pub(super) handlers: u64,
    pub(super) pushes: usize,
    pub(super) pulls: usize,
    /// By server.
    pub(super) stamps: Vec<Stamps>,
    pub(super) copied_bytes: u64,
    pub(super) outcome: Option<Result<(), Failure>>,
}

impl Finished {
    /// What is known of a request before its replies.
    fn of(trip: &Trip) -> Self {
        Self {
            handlers: trip.handlers,
            pushes: trip.pushes.len(),
            pulls: trip.pulls.len(),
            stamps: Vec::new(),
            copied_bytes: trip.copied_bytes,
            outcome: None,
        }
    }
}

pub(super) struct Flights {
    /// Where tensors may be on a GPU; a gate for each slot. First, to be dropped first.
    pub(super) copies: Option<Copies>,
    pub(super) attention: Attention,
    /// By slot.
    pub(super) flights: Vec<Option<(u64, Flight)>>,
    pub(super) finished: BTreeMap<u64, Finished>,
    /// Those that were waited for, oldest first.
    pub(super) waited: VecDeque<u64>,
    /// Slots that the program fills in place before it pushes them.
    pub(super) filling: Vec<SendBuffer>,
    /// Tensors of requests that are over; let go of with the interpreter's lock in hand.
    pub(super) let_go: Vec<View>,
    pub(super) next_handler: u64,
    pub(super) sequence: u64,
    pub(super) table: Vec<u8>,
    pub(super) spare: Spare,
    /// The slot that was used last.
    pub(super) last: usize,
}

impl Flights {
    /// Takes every request as far as it will go.
    pub(super) fn advance(&mut self) {
        for slot in 0..self.flights.len() {
            if let Some((handler, flight)) = self.flights[slot].take() {
                self.flights[slot] = self.step(slot, handler, flight).map(|flight| (handler, flight));
            }
        }
    }

    /// Takes one of them on; none once it is over.
    fn step(&mut self, slot: usize, handler: u64, flight: Flight) -> Option<Flight> {
        let Flight { stage, mut trip } = flight;
        let stage = match stage {
            Stage::Filling(..) | Stage::Emptying(_) if !self.is_copied(slot) => stage,
            Stage::UnderWay(ticket) if !self.attention.is_over(ticket) => stage,
            Stage::Filling(buffer, request, bytes) => {
                trip.posted_ns = now_ns();
                match self.send(buffer, &request, bytes) {
                    Ok(ticket) => Stage::UnderWay(ticket),
                    Err(error) => {
                        let finished = Finished { outcome: Some(Err(error)), ..Finished::of(&trip) };
                        self.finish(handler, trip, finished);
                        return None;
                    }
                }
            }
            Stage::UnderWay(ticket) => match self.land(slot, ticket, &trip) {
                (finished, true) => Stage::Emptying(finished),
                (finished, false) => {
                    self.finish(handler, trip, finished);
                    return None;
                }
            },
            Stage::Emptying(finished) => {
                self.finish(handler, trip, finished);
                return None;
            }
        };
        Some(Flight { stage, trip })
    }

    fn is_copied(&mut self, slot: usize) -> bool {
        self.copies.as_mut().is_none_or(|copies| copies.take(slot))
    }

    /// Takes up what has come back, and has it copied to where it is waited for; whether that goes on.
    fn land(&mut self, slot: usize, ticket: Ticket, trip: &Trip) -> (Finished, bool) {
        let received_ns = now_ns();
        let (mut finished, mut pieces) = (Finished::of(trip), Vec::new());
        let landed = self.attention.take(ticket).map_err(Failure::from);
        let outcome = landed.and_then(|ranks| {
            let share = trip.pulls.len() / ranks.len().max(1);
            for (rank, landed) in ranks.iter().enumerate() {
                let reply = deliver(rank, landed, &trip.pulls[rank * share..(rank + 1) * share], &mut pieces)?;
                let stamp = reply.stamp;
                finished.copied_bytes += stamp.copied_bytes;
                finished.copied_bytes += reply.result.iter().flatten().map(|entry| u64::from(entry.bytes)).sum::<u64>();
                finished.stamps.push([
                    trip.requested_ns,
                    trip.posted_ns,
                    stamp.received_ns,
                    stamp.process_ns,
                    stamp.respond_ns,
                    stamp.posted_ns,
                    received_ns,
                    now_ns(),
                ]);
            }
            match &mut self.copies {
                // SAFETY: the pulls are the GPU's, held with the flight and not to be touched by the program; the slot is not used
                // again before the flight is over.
                Some(copies) if !pieces.is_empty() => unsafe { copies.start(None, slot, &pieces) },
                _ => Ok(()),
            }
        });
        let goes_on = outcome.is_ok() && !pieces.is_empty();
        finished.outcome = Some(outcome);
        (finished, goes_on)
    }

    fn finish(&mut self, handler: u64, trip: Trip, mut finished: Finished) {
        if self.copies.is_some() {
            // What the GPU has copied meanwhile is there now.
            let now_ns = now_ns();
            finished.stamps.iter_mut().for_each(|stamps| stamps[7] = now_ns);
        }
        self.let_go.extend(trip.pushes.into_iter().chain(trip.pulls));
        self.finished.insert(handler, finished);
        if self.finished.len() > UNCLAIMED {
            self.finished.pop_first();
        }
    }

    pub(super) fn is_outstanding(&self, handler: u64) -> bool {
        self.flights.iter().flatten().any(|(id, _)| *id == handler)
    }

    pub(super) fn send(&mut self, slot: SendBuffer, request: &Request, tensors: usize) -> Result<Ticket, Failure> {
        let mut slot = slot;
        request.encode(&mut self.table)?;
        slot.part_mut(0)[..self.table.len()].copy_from_slice(&self.table);
        // A group for each rank: what several ranks send is answered apart.
        let group = self.attention.rank;
        let parts = parts(self.table.len(), tensors);
        Ok(self.attention.push_pull(slot, MeshRequest { group, parts: &parts, ..MeshRequest::default() })?)
    }

    /// A slot that is free, if there is one now; the one that was used last only if there is no other.
    pub(super) fn acquire(&mut self) -> Option<Result<SendBuffer, Failure>> {
        let others = (0..self.flights.len()).filter(|&slot| slot != self.last);
        for slot in others.chain([self.last]) {
            if self.flights[slot].is_some() {
                continue;
            }
            match self.attention.acquire(slot as u16) {
                Ok(buffer) => {
                    self.last = slot;
                    return Some(Ok(buffer));
                }
                Err(MeshError::WouldBlock(_)) => {}
                Err(error) => return Some(Err(error.into())),
            }
        }
        None
    }
}

/// Copies one server's tensors to where they are waited for; those of a GPU are left to its copy engines.
fn deliver(rank: usize, landed: &Landed, pulls: &[View], pieces: &mut Vec<Piece>) -> Result<Reply, Failure> {
    let failed = |why: String| Failure::Peer(format!("FFN server {rank}: {why}"));
    let [(_, Some((table, at))), (_, Some((tensors, from)))] = &landed.parts[..] else {
        return Err(failed("a reply of another kind".to_owned()));
    };
    let mut bytes = vec![0; at.len()];
    table.read(at.start, &mut bytes)?;
    let reply = Reply::decode(&bytes, from.len()).map_err(|error| failed(error.to_string()))?;
    let entries = match &reply.result {
        Ok(entries) => entries,
        Err(reason) => return Err(failed(reason.clone())),
    };
    if entries.len() != pulls.len() {
        return Err(failed(format!("{} tensors came for {} pulls", entries.len(), pulls.len())));
    }
    for (entry, pull) in entries.iter().zip(pulls) {
        if entry.bytes as usize > pull.bytes || entry.dtype != pull.dtype {
            return Err(failed(format!("key {}: {} bytes came for {}", entry.key, entry.bytes, pull.bytes)));
        }
        let bytes = entry.bytes as usize;
        let place = from.start + entry.offset as usize;
        if bytes > 0 && pull.gpu.is_some() {
            let from = tensors.at(place..place + bytes)?.as_ptr() as usize;
            pieces.push(Piece { slot: tensors.clone(), from, to: pull.address, bytes });
        } else if bytes > 0 {
            // SAFETY: writable and held until the request is over; the program gave it to be written to.
            let to = unsafe { std::slice::from_raw_parts_mut(pull.address as *mut u8, bytes) };
            tensors.read(place, to)?;
        }
    }
    Ok(reply)
}

impl Driven for Flights {
    fn poll(&mut self) -> Result<(), MeshError> {
        self.attention.poll()?;
        self.advance();
        Ok(())
    }

    fn settled(&mut self) -> u64 {
        let over = self.finished.last_key_value().map_or(0, |(handler, _)| *handler);
        self.attention.settled().wrapping_mul(31).wrapping_add(over).wrapping_add(self.finished.len() as u64)
    }

    fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
        if self.copies.as_ref().is_some_and(Copies::are_under_way) {
            rest();
            return Ok(());
        }
        if self.copies.is_none() && self.filling.is_empty() {
            // SAFETY: no GPU, and the program writes to slots that are being filled only.
            unsafe { self.spare.prepare() };
        }
        self.attention.sleep(deadline)
    }
}
