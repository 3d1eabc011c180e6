//! The requests that have come to a server: in the order that each worker sent them, one of each at a time.

use super::copies::{Copies, rest};
use super::spare::Spare;
use super::{now_ns, parts};
use crate::error::Failure;
use crate::member::Ffn;
use pyo3::prelude::*;
use rustc_hash::FxHashMap;
use std::collections::{HashMap, VecDeque};
use std::time::Instant;
use stepmesh_embed::{Driven, Entry, Reply, Request, Stamp};
use stepmesh_mesh::{Batch, MeshError, MeshEvent, Policy, Role};

/// A request that waits.
pub(super) struct Incoming {
    pub(super) batch: Batch,
    pub(super) request: Request,
    pub(super) rank: usize,
    pub(super) received_ns: u64,
}

/// A request that was handed out.
pub(super) struct Handed {
    pub(super) batch: Batch,
    pub(super) pulls: Vec<Entry>,
    pub(super) stamp: Stamp,
}

/// An answer whose tensors are being copied to its slot.
pub(super) struct Leaving {
    pub(super) gate: usize,
    pub(super) batch: Batch,
    pub(super) stamp: Stamp,
    pub(super) entries: Vec<Entry>,
    pub(super) bytes: usize,
    /// The tensors.
    pub(super) keepers: Vec<Py<PyAny>>,
}

/// A worker as the server knows it.
#[derive(Default)]
pub(super) struct Peer {
    pub(super) queue: VecDeque<Incoming>,
    /// The number of the request that comes next; none after a new link.
    pub(super) expected: Option<u64>,
    pub(super) stopped: bool,
    /// For its answers.
    pub(super) spare: Spare,
    /// It was lost: why, until that has been said, and then nothing until another takes its place.
    pub(super) lost: Option<Option<String>>,
}

impl Peer {
    pub(super) fn pop(&mut self) -> Option<Incoming> {
        let incoming = self.queue.pop_front()?;
        self.expected = Some(incoming.request.sequence + 1);
        Some(incoming)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.queue.front().is_some_and(|front| self.expected.is_none_or(|expected| expected == front.request.sequence))
    }
}

pub(super) struct Inbox {
    /// Where tensors may be on a GPU; a gate for each worker's slots, and one more. First, to be dropped first.
    pub(super) copies: Option<Copies>,
    pub(super) ffn: Ffn,
    pub(super) leaving: Vec<Leaving>,
    /// Tensors that were copied; let go of with the interpreter's lock in hand.
    pub(super) let_go: Vec<Py<PyAny>>,
    pub(super) peers: Vec<Peer>,
    pub(super) handed: FxHashMap<u64, Handed>,
    pub(super) next_handler: u64,
    /// Bytes of the registered place of a worker's key.
    pub(super) registered: HashMap<(usize, u64), usize>,
    pub(super) table: Vec<u8>,
}

impl Inbox {
    /// Takes in a batch of the mesh's: a request for each segment.
    pub(super) fn receive(&mut self, mut batch: Batch) -> Result<(), MeshError> {
        if batch.segments.len() == 1 {
            return self.receive_one(batch);
        }
        for segment in batch.segments.drain(..) {
            let one = Batch { microbatch: batch.microbatch, group: batch.group, segments: vec![segment] };
            self.receive_one(one)?;
        }
        Ok(())
    }

    pub(super) fn receive_one(&mut self, batch: Batch) -> Result<(), MeshError> {
        let received_ns = now_ns();
        let segment = &batch.segments[0];
        let rank = segment.rank();
        let stamp = Stamp { received_ns, process_ns: received_ns, respond_ns: received_ns, ..Stamp::default() };
        let request = match Request::decode(segment.part(0), segment.part(1).len()) {
            Ok(request) => request,
            Err(error) => return self.answer(batch, stamp, Err(error.to_string()), 0),
        };
        if self.peers.len() <= rank {
            self.peers.resize_with(rank + 1, Peer::default);
        }
        if request.stops {
            self.peers[rank].stopped = true;
            return self.answer(batch, stamp, Ok(Vec::new()), 0);
        }
        let peer = &mut self.peers[rank];
        (peer.stopped, peer.lost) = (false, None);
        let at = peer.queue.partition_point(|waiting| waiting.request.sequence < request.sequence);
        peer.queue.insert(at, Incoming { batch, request, rank, received_ns });
        Ok(())
    }

    /// Answers with tensors that lie in the reply slot, or with a reason.
    pub(super) fn answer(
        &mut self,
        mut batch: Batch,
        stamp: Stamp,
        result: Result<Vec<Entry>, String>,
        tensor_bytes: usize,
    ) -> Result<(), MeshError> {
        let reply = Reply { stamp: Stamp { posted_ns: now_ns(), ..stamp }, result };
        let segment = &mut batch.segments[0];
        match reply.encode(&mut self.table) {
            Ok(()) => {
                segment.reply_mut(0)[..self.table.len()].copy_from_slice(&self.table);
                segment.set_reply(&parts(self.table.len(), tensor_bytes))?;
            }
            Err(_) => segment.fail("too long a list"),
        }
        self.ffn.respond(batch)
    }

    /// Sends the answers whose tensors are in their slots by now.
    fn send_off(&mut self) -> Result<(), MeshError> {
        let Some(copies) = &mut self.copies else { return Ok(()) };
        let ready: Vec<Leaving> = self.leaving.extract_if(.., |leaving| copies.take(leaving.gate)).collect();
        for Leaving { batch, stamp, entries, bytes, keepers, .. } in ready {
            self.let_go.extend(keepers);
            self.answer(batch, stamp, Ok(entries), bytes)?;
        }
        Ok(())
    }

    pub(super) fn take_in(&mut self, event: &MeshEvent) {
        let (peer, lost) = match event {
            MeshEvent::LinkDown { peer, reason } => (peer, Some(reason)),
            MeshEvent::PeerLost { peer, reason } => (peer, Some(reason)),
            MeshEvent::LinkUp(peer) => (peer, None),
            _ => return,
        };
        if peer.role != Role::Attention {
            return;
        }
        let rank = peer.rank as usize;
        if self.peers.len() <= rank {
            self.peers.resize_with(rank + 1, Peer::default);
        }
        let name = peer.to_string();
        let peer = &mut self.peers[rank];
        peer.expected = None;
        peer.spare = Spare::default();
        match lost {
            Some(reason) => {
                // What of it was not handed out can be answered no more.
                peer.queue.clear();
                if !peer.stopped && peer.lost.is_none() {
                    peer.lost = Some(Some(format!("lost {name}: {reason}")));
                }
            }
            None => (peer.stopped, peer.lost) = (false, None),
        }
    }

    /// Answers requests whose turn it is and that do not fit the place that is registered for them.
    pub(super) fn refuse_outgrown(&mut self) -> Result<(), MeshError> {
        if self.registered.is_empty() {
            return Ok(());
        }
        for rank in 0..self.peers.len() {
            while self.peers[rank].is_ready()
                && let Some(reason) = self.peers[rank].queue.front().and_then(|front| self.outgrown(front))
                && let Some(incoming) = self.peers[rank].pop()
            {
                let at = incoming.received_ns;
                let stamp = Stamp { received_ns: at, process_ns: at, respond_ns: at, ..Stamp::default() };
                self.answer(incoming.batch, stamp, Err(reason), 0)?;
            }
        }
        Ok(())
    }

    pub(super) fn outgrown(&self, incoming: &Incoming) -> Option<String> {
        incoming.request.pushes.iter().find_map(|push| {
            let room = *self.registered.get(&(incoming.rank, push.key))?;
            (push.bytes as usize > room).then(|| {
                let (key, bytes) = (push.key, push.bytes);
                format!("key {key}: {bytes} bytes were pushed into a registered buffer of {room}")
            })
        })
    }

    /// One request of each worker that is there; nothing while one is missing; an error once for each that was lost.
    pub(super) fn next(&mut self) -> Option<Result<Vec<Incoming>, Failure>> {
        if let Some(lost) = self.peers.iter_mut().find_map(|peer| peer.lost.as_mut().and_then(Option::take)) {
            return Some(Err(Failure::Lost(lost)));
        }
        if let Err(error) = self.refuse_outgrown() {
            return Some(Err(error.into()));
        }
        let mut live = self.peers.iter().filter(|peer| peer.lost.is_none() && !(peer.stopped && peer.queue.is_empty()));
        if !live.all(Peer::is_ready) {
            return None;
        }
        Some(Ok(self.peers.iter_mut().filter_map(Peer::pop).collect()))
    }
}

impl Driven for Inbox {
    fn poll(&mut self) -> Result<(), MeshError> {
        self.ffn.poll()?;
        while let Some(event) = self.ffn.news.next() {
            self.take_in(&event);
        }
        while let Some(batch) = self.ffn.try_next_batch(Policy::Any, None)? {
            self.receive(batch)?;
        }
        self.send_off()
    }

    fn settled(&mut self) -> u64 {
        self.ffn.settled()
    }

    fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
        if self.copies.as_ref().is_some_and(Copies::are_under_way) {
            rest();
            return Ok(());
        }
        if self.copies.is_none() && self.handed.is_empty() {
            // SAFETY: no GPU, and the program writes to the slots of requests that it has in hand only.
            self.peers.iter_mut().for_each(|peer| unsafe { peer.spare.prepare() });
        }
        self.ffn.sleep(deadline)
    }
}
