//! One lane: a queue pair, the work that is posted to it, and the receives that its immediates use up.

use super::INLINE_BYTES;
use super::chain::{self, Scratch};
use super::context::Context;
use super::endpoint::Rail;
use super::memory::Registered;
use super::queue_pair::{QueuePair, RECEIVE_BATCH, Shape};
use super::sys::*;
use crate::{Access, Completion, LinkId, PostError, Region, Source, TransportError, Work, WorkError};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::slice;
use std::sync::Arc;

/// Of a completion's id: the link (32 bits), the lane (8), this bit for posted work, and its sequence number (16).
pub(super) const SEND: u64 = 1 << 16;

/// The id of a lane's receives, and what those of its work begin with.
pub(super) fn id(link: LinkId, lane: u8) -> u64 {
    u64::from(link.0) << 32 | u64::from(lane) << 24
}

struct Posted {
    token: Option<u64>,
    goes_on: bool,
    /// Kept alive until the device is done with it.
    _region: Option<Region>,
}

/// See the module. Fields drop in this order.
pub(super) struct Lane {
    pair: QueuePair,
    link: LinkId,
    number: u8,
    posted: VecDeque<Posted>,
    /// The sequence number of the oldest posted work.
    oldest: u16,
    depth: usize,
    /// Work since the last that will tell of its completion.
    unsignalled: usize,
    /// Receives that the device holds, and used ones to be posted again.
    receives: usize,
    spent: usize,
    /// The remote keys of the imported regions, as this lane's rail of the peer knows them.
    keys: Vec<u32>,
    /// Where inline bytes wait if the device does not take them.
    ring: Option<Region>,
    context: Arc<Context>,
}

/// Completions that a lane may have in the queue.
pub(super) fn completions(context: &Context) -> usize {
    2 * context.limits.queue_depth + 1 + RECEIVE_BATCH
}

impl Lane {
    /// A lane on a rail that can receive once it is connected.
    pub(super) fn new(rail: &mut Rail, link: LinkId, number: u8) -> Result<Self, TransportError> {
        let Rail { context, queue, .. } = rail;
        let depth = context.limits.queue_depth;
        let receives = depth + RECEIVE_BATCH;
        let atomic = if context.limits.atomics { IBV_ACCESS_REMOTE_ATOMIC } else { 0 };
        let access = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | atomic;
        let shape = Shape { sends: depth + 1, receives, inline: context.options.inline_bytes, access };
        let mut pair = QueuePair::new(context, queue, shape)?;
        pair.post_receives(id(link, number), receives)?;
        let ring = if pair.shape().inline < INLINE_BYTES {
            let len = (depth + 1).next_power_of_two() * INLINE_BYTES;
            Some(Region::new(Arc::new(Registered::allocate(slice::from_ref(context), len, Access::Local, None)?)))
        } else {
            None
        };
        queue.reserve(completions(context))?;
        Ok(Self {
            pair,
            link,
            number,
            posted: VecDeque::with_capacity(depth + 1),
            oldest: 0,
            depth,
            unsignalled: 0,
            receives,
            spent: 0,
            keys: Vec::new(),
            ring,
            context: context.clone(),
        })
    }

    pub(super) fn pair(&self) -> &QueuePair {
        &self.pair
    }

    /// Takes up a region by the key of the peer's rail; its number, the same on all lanes of a link.
    pub(super) fn import(&mut self, key: u32) -> usize {
        self.keys.push(key);
        self.keys.len() - 1
    }

    /// Posts a chain, by one call of the device. An error in the result ends the link.
    pub(super) fn post(
        &mut self,
        incarnation: u32,
        chain: &[Work<'_>],
        scratch: &mut Scratch,
    ) -> Result<Result<(), String>, PostError> {
        let mut count = 0;
        for work in chain {
            count += chain::check(&self.context, self.link, &work.op)?;
        }
        if count > self.depth {
            return Err(PostError::Invalid(format!("a chain of {count} work requests on lanes of {}", self.depth)));
        }
        if count > self.depth - self.posted.len() {
            return Err(PostError::WouldBlock);
        }
        if count == 0 {
            return Ok(Ok(()));
        }
        let (before, unsignalled) = (self.posted.len(), self.unsignalled);
        scratch.clear();
        for work in chain {
            for request in chain::requests(&self.context, incarnation, &self.keys, work) {
                if let Err(why) = self.write_down(&request, scratch) {
                    self.posted.truncate(before);
                    self.unsignalled = unsignalled;
                    return Err(PostError::Invalid(why.to_string()));
                }
            }
        }
        // SAFETY: the list is `scratch`'s, made of checked ranges of registered regions that `posted` keeps alive.
        let Err((stopped, why)) = (unsafe { self.pair.post_send(scratch.list()) }) else { return Ok(Ok(())) };
        let accepted = scratch.before(stopped);
        self.posted.truncate(before + accepted);
        if accepted > 0 {
            return Ok(Err(format!("{} took {accepted} of {count} work requests: {why}", self.context.name)));
        }
        self.unsignalled = unsignalled;
        match why.kind() {
            ErrorKind::OutOfMemory => Err(PostError::WouldBlock),
            _ => Err(PostError::Invalid(format!("{} does not take the work: {why}", self.context.name))),
        }
    }

    /// Adds one request to the list, and to what is posted.
    fn write_down(&mut self, request: &chain::Request<'_>, scratch: &mut Scratch) -> Result<(), TransportError> {
        let sequence = self.oldest.wrapping_add(self.posted.len() as u16);
        let inline = self.pair.shape().inline;
        let copied = |bytes: *const u8, len| (IBV_SEND_INLINE, ibv_sge { addr: bytes as u64, length: len, lkey: 0 });
        let mut region = None;
        let (mut flags, piece) = match request.local {
            local if local.is_empty() => (0, ibv_sge::default()),
            Source::Inline(bytes) if bytes.len() <= inline => copied(bytes.as_ptr(), bytes.len() as u32),
            Source::Inline(bytes) => (0, self.stage(sequence, bytes)?),
            // What is little costs the device less when it comes with the request.
            Source::Region(source, start, len) if len <= inline && request.is_write() && !source.on_device() => {
                copied(source.base().as_ptr().wrapping_add(start), len as u32)
            }
            Source::Region(source, start, len) => {
                region = Some(source.clone());
                (0, self.piece(source, start, len)?)
            }
        };
        self.unsignalled += 1;
        if request.token.is_some() || self.unsignalled >= self.depth / 4 {
            flags |= IBV_SEND_SIGNALED;
            self.unsignalled = 0;
        }
        scratch.push(id(self.link, self.number) | u64::from(sequence), flags, request, piece);
        self.posted.push_back(Posted { token: request.token, goes_on: request.goes_on, _region: region });
        Ok(())
    }

    fn piece(&self, region: &Region, start: usize, len: usize) -> Result<ibv_sge, TransportError> {
        let own = Registered::of(region, &self.context);
        let own = own.ok_or_else(|| TransportError::invalid("a region of another device"))?;
        // Registered addresses count from the region's start.
        Ok(ibv_sge { addr: start as u64, length: len as u32, lkey: own.local_key(&self.context)? })
    }

    /// Copies inline bytes to where the device can fetch them: each sequence number that may be posted has its place.
    fn stage(&self, sequence: u16, bytes: &[u8]) -> Result<ibv_sge, TransportError> {
        let ring = self.ring.as_ref().ok_or_else(|| TransportError::invalid("no room for inline bytes"))?;
        let start = usize::from(sequence) * INLINE_BYTES % ring.len();
        ring.write(start, bytes)?;
        self.piece(ring, start, bytes.len())
    }

    /// Ends the lane: all that is posted completes, and then it is drained.
    pub(super) fn fail(&mut self) {
        if self.pair.fail().is_err() {
            // The device is lost. Nothing will complete.
            self.receives = 0;
            return;
        }
        // Work that was done without telling so tells nothing now: a last request, flushed at once, marks the end.
        let sequence = self.oldest.wrapping_add(self.posted.len() as u16);
        let mut marker = ibv_send_wr {
            wr_id: id(self.link, self.number) | SEND | u64::from(sequence),
            opcode: IBV_WR_RDMA_WRITE,
            send_flags: IBV_SEND_SIGNALED,
            ..Default::default()
        };
        // SAFETY: a list of one request, which names no memory.
        if unsafe { self.pair.post_send(&mut marker) }.is_ok() {
            self.posted.push_back(Posted { token: None, goes_on: false, _region: None });
        }
    }

    /// Whether everything that was posted has completed.
    pub(super) fn is_drained(&self) -> bool {
        self.posted.is_empty() && self.receives == 0
    }

    /// A receive has completed, by an immediate or flushed.
    pub(super) fn received(&mut self, flushed: bool) -> Result<(), TransportError> {
        self.receives = self.receives.saturating_sub(1);
        if flushed {
            return Ok(());
        }
        self.spent += 1;
        if self.spent == RECEIVE_BATCH {
            self.pair.post_receives(id(self.link, self.number), self.spent)?;
            self.receives += std::mem::take(&mut self.spent);
        }
        Ok(())
    }

    /// Work has completed, and with it, all before it; `error` says what went wrong with the last.
    pub(super) fn sent(&mut self, sequence: u16, error: Option<WorkError>, completions: &mut Vec<Completion>) {
        let count = usize::from(sequence.wrapping_sub(self.oldest)) + 1;
        if count > self.posted.len() {
            return;
        }
        for _ in 1..count {
            self.finish(None, completions);
        }
        self.finish(error, completions);
    }

    /// Reports what is left as flushed.
    pub(super) fn abandon(&mut self, completions: &mut Vec<Completion>) {
        while !self.posted.is_empty() {
            self.finish(Some(WorkError::Flushed), completions);
        }
    }

    /// Reports the oldest work. Where a part of it failed, its other parts are not told of.
    fn finish(&mut self, error: Option<WorkError>, completions: &mut Vec<Completion>) {
        while let Some(posted) = self.posted.pop_front() {
            self.oldest = self.oldest.wrapping_add(1);
            if posted.goes_on && error.is_some() {
                continue;
            }
            let (token, result) = match (posted.token, error) {
                (Some(token), None) => (token, Ok(())),
                (Some(token), Some(error)) => (token, Err(error)),
                (None, Some(WorkError::RemoteAccess)) => (u64::MAX, Err(WorkError::RemoteAccess)),
                (None, _) => return,
            };
            return completions.push(Completion::Sent { link: self.link, lane: self.number, token, result });
        }
    }
}
