//! A ring by itself, for whoever measures it.

use super::ring::{CAPACITY, Cells, Consumer, Producer};
use crate::sync::AtomicU64;
use std::sync::Arc;

/// Apart from the entries, as it is in shared memory.
#[repr(align(128))]
struct Consumed(AtomicU64);

struct Heap {
    entries: Box<[AtomicU64]>,
    consumed: Consumed,
}

impl Cells for Arc<Heap> {
    fn entry(&self, index: usize) -> &AtomicU64 {
        &self.entries[index]
    }

    fn consumed(&self) -> &AtomicU64 {
        &self.consumed.0
    }
}

/// Both ends of a ring.
pub struct Ring {
    producer: Producer<Arc<Heap>>,
    consumer: Consumer<Arc<Heap>>,
}

impl Default for Ring {
    fn default() -> Self {
        let entries = (0..CAPACITY).map(|_| AtomicU64::new(0)).collect();
        let heap = Arc::new(Heap { entries, consumed: Consumed(AtomicU64::new(0)) });
        Self { producer: Producer::new(heap.clone()), consumer: Consumer::new(heap) }
    }
}

impl Ring {
    /// Puts one in; false if it is full.
    pub fn push(&mut self, immediate: u32) -> bool {
        let fits = self.producer.has_room(1).unwrap_or(false);
        if fits {
            self.producer.push(immediate);
        }
        fits
    }

    /// Takes one out and gives its entry back.
    pub fn pop(&mut self) -> Option<u32> {
        let immediate = self.consumer.next().ok()??;
        self.consumer.release();
        Some(immediate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_comes_out_in_order_until_it_is_full() {
        let mut ring = Ring::default();
        assert_eq!(ring.pop(), None);
        assert!((0..CAPACITY as u32).all(|i| ring.push(i)) && !ring.push(0));
        assert!((0..CAPACITY as u32).all(|i| ring.pop() == Some(i)) && ring.pop().is_none());
    }
}
