//! The replies to one request, read in the slots they landed in.

use crate::layout::{Direction, SlotLayout};
use crate::trace::Trace;
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;
use stepmesh_proto::{Header, Part};
use stepmesh_transport::Region;

/// One FFN instance's reply, or the place for it.
#[derive(Default)]
struct Landing {
    /// Kept from reply to reply: it is nearly always the same.
    region: Option<Region>,
    header: Box<Header>,
    landed_ns: u64,
    has_landed: bool,
}

/// What all FFN instances replied to one request. Whoever can see it owns the microbatch's landing slots meanwhile.
pub struct Replies {
    slot: u16,
    layout: Arc<SlotLayout>,
    requested_ns: u64,
    landings: Vec<Landing>,
}

impl fmt::Debug for Replies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replies").field("microbatch", &self.slot).field("ranks", &self.ranks()).finish_non_exhaustive()
    }
}

impl Replies {
    pub(crate) fn new(slot: u16, layout: Arc<SlotLayout>) -> Self {
        Self { slot, layout, requested_ns: 0, landings: Vec::new() }
    }

    /// Forgets everything and expects the replies of `peers` instances to a request of this time.
    pub(crate) fn reset(&mut self, peers: usize, requested_ns: u64) {
        self.requested_ns = requested_ns;
        self.landings.resize_with(peers, Landing::default);
        self.landings.iter_mut().for_each(|landing| landing.has_landed = false);
    }

    /// A reply has landed in `region`; where its header goes, for one that is worth nothing.
    pub(crate) fn land(&mut self, rank: usize, region: &Region, landed_ns: u64) -> &mut Box<Header> {
        let landing = &mut self.landings[rank];
        if !landing.region.as_ref().is_some_and(|known| known.is_same(region)) {
            landing.region = Some(region.clone());
        }
        (landing.landed_ns, landing.has_landed) = (landed_ns, true);
        &mut landing.header
    }

    /// Forgets everything, and keeps no landing slot in being.
    pub(crate) fn let_go(&mut self) {
        self.landings.iter_mut().for_each(|landing| (landing.region, landing.has_landed) = (None, false));
    }

    /// The same slot without a reply; takes no memory until it is reset.
    pub(crate) fn take(&mut self) -> Self {
        let landings = std::mem::take(&mut self.landings);
        Self { slot: self.slot, layout: self.layout.clone(), requested_ns: self.requested_ns, landings }
    }

    fn landing(&self, rank: usize) -> Option<&Landing> {
        self.landings.get(rank).filter(|landing| landing.has_landed)
    }

    /// The microbatch.
    pub fn microbatch(&self) -> u16 {
        self.slot
    }

    /// FFN instances that replied: all of them.
    pub fn ranks(&self) -> usize {
        self.landings.len()
    }

    /// What one FFN instance's reply says of its parts.
    pub fn parts(&self, rank: usize) -> &[Part] {
        self.landing(rank).map_or(&[], |landing| landing.header.parts())
    }

    /// The bytes in use of one part of one FFN instance's reply, `[rows, row_bytes]`.
    pub fn part(&self, rank: usize, part: usize) -> &[u8] {
        let Some(landing) = self.landing(rank) else { return &[] };
        let Some(used) = landing.header.parts().get(part) else { return &[] };
        let start = self.layout.slot_offset(Direction::F2A, self.slot) + used.offset as usize;
        // SAFETY: the reply has landed and the FFN instance may not write the slot before the next request on it, which
        // cannot be made while this value can be seen.
        let bytes = landing.region.as_ref().map(|region| unsafe { region.bytes(start..start + used.bytes() as usize) });
        bytes.and_then(Result::ok).unwrap_or_default()
    }

    /// Where the bytes in use of one part lie, for what must outlive this value: the region keeps the memory in being, no
    /// more; after the next request on the microbatch the FFN instance may write there.
    pub fn part_place(&self, rank: usize, part: usize) -> Option<(Region, Range<usize>)> {
        let landing = self.landing(rank)?;
        let used = landing.header.parts().get(part)?;
        let start = self.layout.slot_offset(Direction::F2A, self.slot) + used.offset as usize;
        Some((landing.region.clone()?, start..start + used.bytes() as usize))
    }

    /// The application's bytes of one FFN instance's reply.
    pub fn app(&self, rank: usize) -> [u8; 16] {
        self.landing(rank).map_or([0; 16], |landing| landing.header.app)
    }

    /// Where the time went between this side and one FFN instance.
    pub fn trace(&self, rank: usize) -> Trace {
        let trace = |landing: &Landing| Trace::new(self.requested_ns, landing.landed_ns, landing.header.stamps);
        self.landing(rank).map(trace).unwrap_or_default()
    }
}

/// The replies to one request, in place. The microbatch's slots belong to the reader until the next request on it,
/// which the borrow excludes.
#[derive(Debug)]
pub struct Reply<'a>(pub(crate) &'a Replies);

impl Deref for Reply<'_> {
    type Target = Replies;

    fn deref(&self) -> &Replies {
        self.0
    }
}
