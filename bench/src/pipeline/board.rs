//! What the two sides of a run have in common, in memory that two processes can share: how long stages take, how long they
//! have taken and what CPU time, and when what is on the wire was posted.

use crate::Scheduling;
use crate::shared::{Common, Shared};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Immediates of one direction that may be under way: more than there are microbatches.
const UNDER_WAY: usize = 64;

/// How long a side that rests sleeps before it looks again.
const REST: Duration = Duration::from_millis(1);

/// Words that both sides read and write. All are zero at first.
#[repr(C)]
pub(super) struct Words {
    /// Not zero: the run is over.
    pub(super) over: AtomicU64,
    /// Not zero: neither side works, so that the two CPUs are free.
    rests: AtomicU64,
    /// Not zero: threads whose stages sleep are real-time.
    real_time: AtomicU64,
    /// Attention, FFN.
    pub(super) sides: [Side; 2],
    pub(super) ways: [Way; 2],
}

impl Words {
    /// Lets both sides rest, or work again.
    pub(super) fn rest(&self, rest: bool) {
        self.rests.store(rest.into(), Ordering::Release);
    }

    /// How both sides are to schedule a thread whose stages sleep.
    pub(super) fn schedule(&self, scheduling: Scheduling) {
        self.real_time.store((scheduling == Scheduling::RealTime).into(), Ordering::Release);
    }

    pub(super) fn scheduling(&self) -> Scheduling {
        if self.real_time.load(Ordering::Acquire) != 0 { Scheduling::RealTime } else { Scheduling::Ordinary }
    }

    /// Where a side is that has nothing under way: rests while it is to.
    pub(super) fn pass(&self) {
        while self.rests.load(Ordering::Acquire) != 0 && self.over.load(Ordering::Acquire) == 0 {
            std::thread::sleep(REST);
        }
    }
}

/// What a side's stage takes, and has taken. Apart from the other's.
#[repr(C, align(128))]
pub(super) struct Side {
    pub(super) stage_ns: AtomicU64,
    pub(super) busy_ns: AtomicU64,
    /// CPU time that the stage's thread has used.
    pub(super) cpu_ns: AtomicU64,
}

/// One direction of the wire between two ends with one link of one lane: when each immediate was posted, in order, by the
/// clock of its sender. What one end writes lies apart from what the other one does, so that neither waits for the other's.
#[repr(C)]
pub(super) struct Way {
    pub(super) latency_ns: AtomicU64,
    sender: Sender,
    receiver: Receiver,
}

#[repr(C, align(128))]
struct Sender {
    posted: AtomicU64,
    /// So many were taken when the sender last looked.
    known_taken: AtomicU64,
    posted_ns: [AtomicU64; UNDER_WAY],
}

#[repr(C, align(128))]
struct Receiver {
    taken: AtomicU64,
}

impl Way {
    /// Sender: so many immediates are posted now. False if there is no room to note them.
    pub(super) fn post(&self, count: usize, now_ns: u64) -> bool {
        let Sender { posted, known_taken, posted_ns } = &self.sender;
        let first = posted.load(Ordering::Relaxed);
        let next = first + count as u64;
        if next - known_taken.load(Ordering::Relaxed) > UNDER_WAY as u64 {
            let taken = self.receiver.taken.load(Ordering::Acquire);
            known_taken.store(taken, Ordering::Relaxed);
            if next - taken > UNDER_WAY as u64 {
                return false;
            }
        }
        for index in first..next {
            posted_ns[index as usize % UNDER_WAY].store(now_ns, Ordering::Relaxed);
        }
        posted.store(next, Ordering::Release);
        true
    }

    /// Sender: the last so many were not posted after all, so the receiver has not heard of them.
    pub(super) fn take_back(&self, count: usize) {
        self.sender.posted.fetch_sub(count as u64, Ordering::Release);
    }

    /// Receiver: when the oldest that is under way was posted.
    pub(super) fn oldest_ns(&self) -> Option<u64> {
        let taken = self.receiver.taken.load(Ordering::Relaxed);
        (taken < self.sender.posted.load(Ordering::Acquire))
            .then(|| self.sender.posted_ns[taken as usize % UNDER_WAY].load(Ordering::Relaxed))
    }

    /// Receiver: the oldest has arrived.
    pub(super) fn take(&self) {
        let taken = &self.receiver.taken;
        taken.store(taken.load(Ordering::Relaxed) + 1, Ordering::Release);
    }
}

/// Shared by both sides.
pub(super) type Board = Shared<Words>;

// SAFETY: atomics only.
unsafe impl Common for Words {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_mapping_posts_the_other_takes_in_order_and_no_more_than_fits() {
        let ours = Board::new().expect("memory");
        let theirs = Board::open(&ours.path()).expect("the same memory");
        for round in 0..3 {
            for now_ns in 0..UNDER_WAY as u64 {
                assert!(ours.ways[0].post(1, round * 1000 + now_ns));
            }
            assert!(!ours.ways[0].post(1, 0), "full");
            ours.ways[0].take_back(1);
            for now_ns in 0..UNDER_WAY as u64 - 1 {
                assert_eq!(theirs.ways[0].oldest_ns(), Some(round * 1000 + now_ns));
                theirs.ways[0].take();
            }
            assert_eq!((theirs.ways[0].oldest_ns(), theirs.ways[1].oldest_ns()), (None, None));
        }
    }
}
