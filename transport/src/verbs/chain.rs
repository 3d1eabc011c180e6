//! Posted chains as the device's lists of work requests: what can be is checked, long work is cut into messages.

use super::context::Context;
use super::memory::Registered;
use super::sys::*;
use super::{INLINE_BYTES, lane};
use crate::endpoint::check_fetch_add;
use crate::{LinkId, Op, PostError, Provider, Remote, Source, Target, Work};
use std::sync::Arc;

/// Refuses what cannot be, whatever the peer has granted; else how many work requests it takes.
pub(super) fn check(context: &Arc<Context>, link: LinkId, op: &Op<'_>) -> Result<usize, PostError> {
    let invalid = |what: String| Err(PostError::Invalid(what));
    let (source, remote) = match op {
        Op::Write { source, remote } => (*source, Some(remote)),
        Op::WriteImmediate { source, remote, .. } => (*source, remote.as_ref()),
        Op::Read { remote, target } => (check_target(target)?, Some(remote)),
        Op::FetchAdd { .. } if !context.limits.atomics => {
            return Err(PostError::Unsupported { provider: Provider::Verbs, what: "fetch-add on this device" });
        }
        Op::FetchAdd { remote, target, .. } => {
            check_fetch_add(remote, target)?;
            (check_target(target)?, Some(remote))
        }
    };
    match (source, remote) {
        (Source::Inline(bytes), _) if bytes.len() > INLINE_BYTES => {
            return invalid(format!("{} inline bytes, of {INLINE_BYTES} at most", bytes.len()));
        }
        (Source::Region(region, start, len), _) if start.checked_add(len).is_none_or(|end| end > region.len()) => {
            return invalid(format!("{len} bytes at {start} of a region of {} bytes", region.len()));
        }
        (Source::Region(region, ..), _) if Registered::of(region, context).is_none() => {
            return invalid(format!(
                "{region:?} was neither allocated nor registered by this device, {}",
                context.name
            ));
        }
        (_, None) if !source.is_empty() => return invalid("bytes to write, and no place to write them to".into()),
        _ => {}
    }
    match remote {
        Some(remote) if remote.region.link != link => {
            invalid(format!("a region of {:?} in work for {link:?}", remote.region.link))
        }
        _ => Ok(messages(source.len(), context)),
    }
}

/// Where bytes come to, as a local range; its bounds are checked with those of sources.
fn check_target<'a>(target: &Target<'a>) -> Result<Source<'a>, PostError> {
    if target.region.writable() {
        Ok(Source::Region(target.region, target.offset, target.len))
    } else {
        Err(PostError::Invalid("bytes would come to memory that was registered as read-only".into()))
    }
}

/// How many messages of the device so many bytes take.
fn messages(bytes: usize, context: &Context) -> usize {
    let most = context.limits.message_bytes;
    if bytes <= most { 1 } else { bytes.div_ceil(most) }
}

/// One work request before it is written down.
pub(super) struct Request<'a> {
    pub(super) opcode: ibv_wr_opcode,
    pub(super) immediate: u32,
    /// What a fetch-add adds.
    pub(super) add: u64,
    /// Where the bytes come from, or for a read and a fetch-add go to.
    pub(super) local: Source<'a>,
    pub(super) address: u64,
    pub(super) key: u32,
    pub(super) token: Option<u64>,
    /// The same work goes on in the next request.
    pub(super) goes_on: bool,
}

/// The requests of checked work, the immediate and the signal on the last. A key that this link's peer did not give out
/// becomes none at all: the device of the peer must be the one to refuse it, and in order. `keys` are those of the lane.
pub(super) fn requests<'a>(
    context: &Context,
    incarnation: u32,
    keys: &[u32],
    work: &Work<'a>,
) -> impl Iterator<Item = Request<'a>> + use<'a> {
    let mut summand = 0;
    let (opcode, last_opcode, whole, remote, immediate) = match work.op {
        Op::Write { source, remote } => (IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE, source, Some(remote), 0),
        Op::WriteImmediate { source, remote, immediate } => {
            (IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, source, remote, immediate)
        }
        Op::Read { remote, target } => {
            let whole = Source::Region(target.region, target.offset, target.len);
            (IBV_WR_RDMA_READ, IBV_WR_RDMA_READ, whole, Some(remote), 0)
        }
        Op::FetchAdd { remote, target, add } => {
            summand = add;
            let whole = Source::Region(target.region, target.offset, target.len);
            (IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_ATOMIC_FETCH_AND_ADD, whole, Some(remote), 0)
        }
    };
    let key_of = |key: u64| {
        let own = key >> 32 == u64::from(incarnation);
        own.then(|| keys.get(key as u32 as usize).copied()).flatten().unwrap_or(0)
    };
    let (start, key) = remote.map_or((0, 0), |Remote { region, offset }| (offset, key_of(region.key)));
    let (len, most, signal) = (whole.len(), context.limits.message_bytes, work.signal);
    let count = messages(len, context);
    (0..count).map(move |index| {
        let (done, last) = (index * most, index + 1 == count);
        let local = match whole {
            Source::Inline(bytes) => Source::Inline(bytes),
            Source::Region(region, from, _) => Source::Region(region, from + done, (len - done).min(most)),
        };
        Request {
            opcode: if last { last_opcode } else { opcode },
            immediate,
            add: summand,
            local,
            address: start.wrapping_add(done as u64),
            key,
            token: if last { signal } else { None },
            goes_on: !last,
        }
    })
}

impl Request<'_> {
    /// Its bytes go from here to the peer.
    pub(super) fn is_write(&self) -> bool {
        matches!(self.opcode, IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM)
    }

    fn remote(&self) -> ibv_send_wr__bindgen_ty_2 {
        let (remote_addr, rkey) = (self.address, self.key);
        if self.opcode == IBV_WR_ATOMIC_FETCH_AND_ADD {
            let atomic = ibv_send_wr__bindgen_ty_2__bindgen_ty_2 { remote_addr, compare_add: self.add, swap: 0, rkey };
            return ibv_send_wr__bindgen_ty_2 { atomic };
        }
        ibv_send_wr__bindgen_ty_2 { rdma: ibv_send_wr__bindgen_ty_2__bindgen_ty_1 { remote_addr, rkey } }
    }
}

/// Room for the longest list, used again for each chain of an endpoint.
pub(super) struct Scratch {
    requests: Vec<ibv_send_wr>,
    pieces: Vec<ibv_sge>,
}

// SAFETY: its pointers lead into itself, and only from `list` to the end of the post that it is made for.
unsafe impl Send for Scratch {}

impl Scratch {
    /// For lists of up to `most` requests.
    pub(super) fn new(most: usize) -> Self {
        Self { requests: Vec::with_capacity(most), pieces: Vec::with_capacity(most) }
    }

    pub(super) fn clear(&mut self) {
        self.requests.clear();
        self.pieces.clear();
    }

    /// Writes a request down.
    pub(super) fn push(&mut self, id: u64, flags: ibv_send_flags, request: &Request<'_>, piece: ibv_sge) {
        self.requests.push(ibv_send_wr {
            wr_id: id | lane::SEND,
            num_sge: i32::from(piece.length > 0),
            opcode: request.opcode,
            send_flags: flags,
            __bindgen_anon_1: ibv_send_wr__bindgen_ty_1 { imm_data: request.immediate.to_be() },
            wr: request.remote(),
            ..Default::default()
        });
        self.pieces.push(piece);
    }

    /// The requests as a list.
    pub(super) fn list(&mut self) -> *mut ibv_send_wr {
        let mut next = std::ptr::null_mut();
        for (request, piece) in self.requests.iter_mut().zip(&mut self.pieces).rev() {
            request.sg_list = piece;
            request.next = next;
            next = request;
        }
        next
    }

    /// How many requests come before `stopped`, one of the list.
    pub(super) fn before(&self, stopped: *const ibv_send_wr) -> usize {
        self.requests.iter().position(|request| std::ptr::eq(request, stopped)).unwrap_or(0)
    }
}
