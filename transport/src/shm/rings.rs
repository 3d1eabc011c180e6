//! The shared memory of one link: a ring for each lane and direction, and a word in which each end says how it left.

use super::memory::{self, Mapping};
use super::ring::{CAPACITY, Cells, Consumer, Producer};
use crate::sync::{self, AtomicU32, AtomicU64, Ordering};
use crate::{Side, TransportError, page_bytes};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// What never shares a cache line: two lines, because neighbours are fetched in pairs.
const APART: usize = 128;
const ENTRY: usize = size_of::<AtomicU64>();
const RING: usize = APART + (CAPACITY * ENTRY).next_multiple_of(APART);
/// The farewells of both directions come first.
const RINGS: usize = 2 * APART;

/// Bytes that a link of `lanes` lanes needs, whole pages.
pub(super) fn size(lanes: u8) -> usize {
    (RINGS + 2 * usize::from(lanes) * RING).next_multiple_of(page_bytes())
}

/// How an end left, as its peer reads it after the hang-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Farewell {
    /// It closed the link.
    Closed = 1,
    /// It asked for an access that it had not been granted.
    AccessRefused = 2,
    /// It was told nonsense.
    Protocol = 3,
}

/// One end's view of a link's memory.
pub(super) struct Rings {
    mapping: Arc<Mapping>,
    lanes: u8,
    side: Side,
}

/// The words of one ring.
pub(super) struct Words {
    ring: NonNull<u8>,
    _mapping: Arc<Mapping>,
}

// SAFETY: a pointer into a mapping that the value keeps alive and reaches by atomics only.
unsafe impl Send for Words {}

impl Rings {
    /// Makes the memory of a link: for the side that dials.
    pub(super) fn create(lanes: u8) -> Result<(Self, OwnedFd), TransportError> {
        let fd = memory::create("stepmesh-link", size(lanes))?;
        memory::seal(&fd, false)?;
        Ok((Self::map(&fd, lanes, Side::Active)?, fd))
    }

    /// Maps what the peer has made, if it is as it should be.
    pub(super) fn adopt(fd: &OwnedFd, lanes: u8) -> Result<Self, String> {
        memory::check(fd, size(lanes))?;
        Self::map(fd, lanes, Side::Passive).map_err(|error| error.to_string())
    }

    fn map(fd: &OwnedFd, lanes: u8, side: Side) -> Result<Self, TransportError> {
        Ok(Self { mapping: Arc::new(Mapping::new(fd.as_fd(), size(lanes), true, None)?), lanes, side })
    }

    /// The rings that this end writes.
    pub(super) fn producers(&self) -> Vec<Producer<Words>> {
        (0..self.lanes).map(|lane| Producer::new(self.words(self.side, lane))).collect()
    }

    /// The rings that this end reads.
    pub(super) fn consumers(&self) -> Vec<Consumer<Words>> {
        (0..self.lanes).map(|lane| Consumer::new(self.words(other(self.side), lane))).collect()
    }

    /// Leaves word why this end is going.
    pub(super) fn leave(&self, farewell: Farewell) {
        self.farewell(self.side).store(farewell as u32, Ordering::Release);
    }

    /// Why the other end went; nothing if it died.
    pub(super) fn left(&self) -> Option<Farewell> {
        match self.farewell(other(self.side)).load(Ordering::Acquire) {
            1 => Some(Farewell::Closed),
            2 => Some(Farewell::AccessRefused),
            3 => Some(Farewell::Protocol),
            _ => None,
        }
    }

    fn farewell(&self, side: Side) -> &AtomicU32 {
        // SAFETY: inside the mapping, which starts with two farewells and is aligned to a page; every access by either
        // process is atomic.
        unsafe { sync::word(self.mapping.base().add(direction(side) * APART)) }
    }

    /// The ring of `lane` that `writer` writes.
    fn words(&self, writer: Side, lane: u8) -> Words {
        let ring = direction(writer) * usize::from(self.lanes) + usize::from(lane);
        // SAFETY: `size` makes the mapping large enough for two rings a lane after the farewells.
        let ring = unsafe { self.mapping.base().add(RINGS + ring * RING) };
        Words { ring, _mapping: self.mapping.clone() }
    }
}

fn direction(writer: Side) -> usize {
    match writer {
        Side::Active => 0,
        Side::Passive => 1,
    }
}

pub(super) fn other(side: Side) -> Side {
    match side {
        Side::Active => Side::Passive,
        Side::Passive => Side::Active,
    }
}

impl Words {
    fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset < RING);
        // SAFETY: `RING` bytes from `self.ring` lie inside the mapping that is kept alive; offsets are multiples of 8;
        // every access by either process is atomic.
        unsafe { sync::word(self.ring.add(offset)) }
    }
}

impl Cells for Words {
    fn entry(&self, index: usize) -> &AtomicU64 {
        self.word(APART + (index & (CAPACITY - 1)) * ENTRY)
    }

    fn consumed(&self) -> &AtomicU64 {
        self.word(0)
    }
}
