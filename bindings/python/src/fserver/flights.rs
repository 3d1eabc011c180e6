//! The requests of a worker: on their way, a slot each, and over, until they are waited for.

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
    pub(super) ticket: Ticket,
    pub(super) handlers: u64,
    pub(super) pushes: usize,
    pub(super) pulls: Vec<View>,
    pub(super) requested_ns: u64,
    pub(super) posted_ns: u64,
    pub(super) copied_bytes: u64,
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

pub(super) struct Flights {
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
}

impl Flights {
    /// Takes up what has come back: copies it to where it is waited for.
    pub(super) fn land(&mut self) {
        for slot in 0..self.flights.len() {
            let Some((_, flight)) = &self.flights[slot] else { continue };
            if !self.attention.is_over(flight.ticket) {
                continue;
            }
            let Some((handler, flight)) = self.flights[slot].take() else { continue };
            let received_ns = now_ns();
            let mut finished = Finished {
                handlers: flight.handlers,
                pushes: flight.pushes,
                pulls: flight.pulls.len(),
                stamps: Vec::new(),
                copied_bytes: flight.copied_bytes,
                outcome: None,
            };
            let landed = self.attention.take(flight.ticket).map_err(Failure::from);
            let outcome = landed.and_then(|ranks| {
                let share = flight.pulls.len() / ranks.len().max(1);
                for (rank, landed) in ranks.iter().enumerate() {
                    let reply = deliver(rank, landed, &flight.pulls[rank * share..(rank + 1) * share])?;
                    let stamp = reply.stamp;
                    finished.copied_bytes += stamp.copied_bytes;
                    finished.copied_bytes +=
                        reply.result.iter().flatten().map(|entry| u64::from(entry.bytes)).sum::<u64>();
                    finished.stamps.push([
                        flight.requested_ns,
                        flight.posted_ns,
                        stamp.received_ns,
                        stamp.process_ns,
                        stamp.respond_ns,
                        stamp.posted_ns,
                        received_ns,
                        now_ns(),
                    ]);
                }
                Ok(())
            });
            finished.outcome = Some(outcome);
            self.let_go.extend(flight.pulls);
            self.finished.insert(handler, finished);
            if self.finished.len() > UNCLAIMED {
                self.finished.pop_first();
            }
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

    /// A slot that is free, if there is one now.
    pub(super) fn acquire(&mut self) -> Option<Result<SendBuffer, Failure>> {
        let free = (0..self.flights.len()).filter(|&slot| self.flights[slot].is_none()).collect::<Vec<_>>();
        for slot in free {
            match self.attention.acquire(slot as u16) {
                Ok(buffer) => return Some(Ok(buffer)),
                Err(MeshError::WouldBlock(_)) => {}
                Err(error) => return Some(Err(error.into())),
            }
        }
        None
    }
}

/// Copies one server's tensors to where they are waited for.
fn deliver(rank: usize, landed: &Landed, pulls: &[View]) -> Result<Reply, Failure> {
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
        if entry.bytes > 0 {
            // SAFETY: writable and held until the request is over; the program gave it to be written to.
            let to = unsafe { std::slice::from_raw_parts_mut(pull.address as *mut u8, entry.bytes as usize) };
            tensors.read(from.start + entry.offset as usize, to)?;
        }
    }
    Ok(reply)
}

impl Driven for Flights {
    fn poll(&mut self) -> Result<(), MeshError> {
        self.attention.poll()?;
        self.land();
        Ok(())
    }

    fn settled(&mut self) -> u64 {
        let over = self.finished.last_key_value().map_or(0, |(handler, _)| *handler);
        self.attention.settled().wrapping_mul(31).wrapping_add(over).wrapping_add(self.finished.len() as u64)
    }

    fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
        self.attention.sleep(deadline)
    }
}
