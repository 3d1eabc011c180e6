//! A ring of immediates from one producer to one consumer that do not trust each other.
//!
//! An entry is one word: the lap that it was written in, and the immediate. The consumer sees from the lap alone whether
//! the entry at its position is new, so a message moves one cache line and no shared head; and eight in a row move the
//! same line, which both cores have at hand. What the other side may have scribbled over is read once and checked: an
//! entry of another lap than this or the one before, or a consumer that claims more than was produced, is [`Nonsense`];
//! no index ever comes from the other side.
//!
//! The words are reached through [`Cells`], so that the logic can be run over any atomics.

use crate::sync::{AtomicU64, Ordering};

/// Immediates that a ring holds; in a model so few that it goes around.
pub(super) const CAPACITY: usize = if cfg!(stepmesh_loom) { 2 } else { 1024 };
const MASK: u64 = CAPACITY as u64 - 1;
const _: () = assert!(CAPACITY.is_power_of_two());

/// The other side wrote what no correct side writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Nonsense;

/// The shared words, all zero at first.
pub(super) trait Cells {
    /// Entry `index`, below [`CAPACITY`]. Written by the producer.
    fn entry(&self, index: usize) -> &AtomicU64;
    /// How many entries the consumer is done with. Written by the consumer.
    fn consumed(&self) -> &AtomicU64;
}

fn index(position: u64) -> usize {
    (position & MASK) as usize
}

/// The lap of a position, from 1, wrapping: a fresh ring is a ring of lap 0.
fn lap(position: u64) -> u32 {
    ((position / CAPACITY as u64) as u32).wrapping_add(1)
}

/// The end that writes. Apart from its neighbours: the two ends may live in one process, side by side on its heap.
#[repr(align(128))]
pub(super) struct Producer<C> {
    cells: C,
    produced: u64,
    consumed: u64,
}

impl<C: Cells> Producer<C> {
    pub(super) fn new(cells: C) -> Self {
        Self { cells, produced: 0, consumed: 0 }
    }

    /// Whether `wanted` more entries fit.
    pub(super) fn has_room(&mut self, wanted: usize) -> Result<bool, Nonsense> {
        if wanted <= self.room() {
            return Ok(true);
        }
        // Acquire: the consumer has read the entries before they are written over.
        let consumed = self.cells.consumed().load(Ordering::Acquire);
        if consumed < self.consumed || consumed > self.produced {
            return Err(Nonsense);
        }
        self.consumed = consumed;
        Ok(wanted <= self.room())
    }

    fn room(&self) -> usize {
        CAPACITY - (self.produced - self.consumed) as usize
    }

    /// Publishes an immediate, and with it every byte that this thread wrote before. The caller has asked for room.
    pub(super) fn push(&mut self, immediate: u32) {
        let word = u64::from(lap(self.produced)) << 32 | u64::from(immediate);
        self.cells.entry(index(self.produced)).store(word, Ordering::Release);
        self.produced += 1;
    }
}

/// The end that reads. Apart from its neighbours, too.
#[repr(align(128))]
pub(super) struct Consumer<C> {
    cells: C,
    consumed: u64,
}

impl<C: Cells> Consumer<C> {
    pub(super) fn new(cells: C) -> Self {
        Self { cells, consumed: 0 }
    }

    /// Whether there is something to take (or to complain about).
    #[inline]
    pub(super) fn is_ready(&self) -> bool {
        self.look() != Ok(None)
    }

    /// Takes the next immediate, if it has arrived; every byte that the producer wrote before it is visible then.
    #[inline]
    pub(super) fn next(&mut self) -> Result<Option<u32>, Nonsense> {
        let found = self.look()?;
        self.consumed += u64::from(found.is_some());
        Ok(found)
    }

    /// What the next entry holds.
    #[inline]
    fn look(&self) -> Result<Option<u32>, Nonsense> {
        let word = self.cells.entry(index(self.consumed)).load(Ordering::Acquire);
        match lap(self.consumed).wrapping_sub((word >> 32) as u32) {
            0 => Ok(Some(word as u32)),
            1 => Ok(None),
            _ => Err(Nonsense),
        }
    }

    /// Gives the taken entries back to the producer.
    pub(super) fn release(&self) {
        self.cells.consumed().store(self.consumed, Ordering::Release);
    }
}

#[cfg(all(test, stepmesh_loom))]
mod model;

#[cfg(all(test, not(stepmesh_loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;

    struct Heap {
        entries: Vec<AtomicU64>,
        consumed: AtomicU64,
    }

    impl Cells for Arc<Heap> {
        fn entry(&self, index: usize) -> &AtomicU64 {
            &self.entries[index]
        }

        fn consumed(&self) -> &AtomicU64 {
            &self.consumed
        }
    }

    fn ring() -> (Arc<Heap>, Producer<Arc<Heap>>, Consumer<Arc<Heap>>) {
        let entries = (0..CAPACITY).map(|_| AtomicU64::new(0)).collect();
        let heap = Arc::new(Heap { entries, consumed: AtomicU64::new(0) });
        (heap.clone(), Producer::new(heap.clone()), Consumer::new(heap))
    }

    #[test]
    fn immediates_arrive_in_order_over_many_laps() {
        let (_, mut producer, mut consumer) = ring();
        let producing = std::thread::spawn(move || {
            for immediate in 0..10 * CAPACITY as u32 {
                while !producer.has_room(1).unwrap() {
                    std::thread::yield_now();
                }
                producer.push(immediate);
            }
        });
        for expected in 0..10 * CAPACITY as u32 {
            let immediate = loop {
                match consumer.next().unwrap() {
                    Some(immediate) => break immediate,
                    None => std::thread::yield_now(),
                }
            };
            assert_eq!(immediate, expected);
            consumer.release();
        }
        producing.join().unwrap();
        assert!(!consumer.is_ready());
    }

    #[test]
    fn a_full_ring_takes_no_more_until_the_consumer_gives_back() {
        let (_, mut producer, mut consumer) = ring();
        for immediate in 0..CAPACITY as u32 {
            producer.push(immediate);
        }
        assert_eq!(producer.has_room(1), Ok(false));
        assert_eq!(consumer.next(), Ok(Some(0)));
        assert_eq!(producer.has_room(1), Ok(false));
        consumer.release();
        assert_eq!(producer.has_room(1), Ok(true));
        assert_eq!(producer.has_room(2), Ok(false));
    }

    #[test]
    fn an_entry_from_another_lap_is_nonsense() {
        let (heap, _, mut consumer) = ring();
        heap.entries[0].store(2 << 32, Ordering::Relaxed);
        assert!(consumer.is_ready());
        assert_eq!(consumer.next(), Err(Nonsense));
    }

    #[test]
    fn what_has_arrived_before_nonsense_is_taken_first() {
        let (heap, mut producer, mut consumer) = ring();
        producer.push(7);
        heap.entries[1].store(2 << 32, Ordering::Relaxed);
        assert_eq!(consumer.next(), Ok(Some(7)));
        assert_eq!(consumer.next(), Err(Nonsense));
    }

    #[test]
    fn a_consumer_that_claims_more_than_was_produced_is_nonsense() {
        let (heap, mut producer, _) = ring();
        for immediate in 0..CAPACITY as u32 {
            producer.push(immediate);
        }
        heap.consumed.store(CAPACITY as u64 + 1, Ordering::Relaxed);
        assert_eq!(producer.has_room(1), Err(Nonsense));
    }
}
