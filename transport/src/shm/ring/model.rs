//! The ring in loom: every interleaving of its two ends, around its laps.

use super::{CAPACITY, Cells, Consumer, Producer};
use crate::sync::AtomicU64;
use loom::cell::UnsafeCell;
use loom::sync::Arc;

struct Shared {
    entries: [AtomicU64; CAPACITY],
    consumed: AtomicU64,
    /// A landing place for each entry: plain memory, as what a peer writes before its immediate.
    slots: [UnsafeCell<u32>; CAPACITY],
}

impl Shared {
    fn new() -> Arc<Self> {
        let entries = std::array::from_fn(|_| AtomicU64::new(0));
        let slots = std::array::from_fn(|_| UnsafeCell::new(u32::MAX));
        Arc::new(Self { entries, consumed: AtomicU64::new(0), slots })
    }
}

impl Cells for Arc<Shared> {
    fn entry(&self, index: usize) -> &AtomicU64 {
        &self.entries[index]
    }

    fn consumed(&self) -> &AtomicU64 {
        &self.consumed
    }
}

/// The producer overwrites a slot only when the consumer has released its entry, and the consumer reads it only when
/// its immediate has come. Loom fails the model if a write and a read are not ordered.
#[test]
fn what_was_written_before_an_immediate_is_there_and_stays_until_its_entry_is_released() {
    const SENT: u32 = CAPACITY as u32 + 2;
    loom::model(|| {
        let shared = Shared::new();
        let (mut producer, mut consumer) = (Producer::new(shared.clone()), Consumer::new(shared.clone()));
        let slots = shared.clone();
        let producing = loom::thread::spawn(move || {
            for immediate in 0..SENT {
                while !producer.has_room(1).unwrap() {
                    loom::thread::yield_now();
                }
                // SAFETY: what loom checks.
                slots.slots[immediate as usize % CAPACITY].with_mut(|slot| unsafe { *slot = immediate });
                producer.push(immediate);
            }
        });
        for expected in 0..SENT {
            let immediate = loop {
                match consumer.next().unwrap() {
                    Some(immediate) => break immediate,
                    None => loom::thread::yield_now(),
                }
            };
            // SAFETY: what loom checks.
            let found = shared.slots[immediate as usize % CAPACITY].with(|slot| unsafe { *slot });
            assert_eq!((immediate, found), (expected, expected));
            consumer.release();
        }
        producing.join().unwrap();
        assert!(!consumer.is_ready());
    });
}
