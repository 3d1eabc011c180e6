//! A microbatch as both threads know it: what takes the replies goes back and forth, and with it the slot.

use crate::sync::{ArrayQueue, AtomicBool, Ordering};

/// `R` takes the replies of one transfer, `E` says why there are none.
#[derive(Debug)]
pub(super) struct Seat<R, E> {
    /// How the outstanding transfer ended.
    outcome: ArrayQueue<Result<R, E>>,
    /// Here while nobody reads a reply and no transfer is under way.
    replies: ArrayQueue<R>,
    /// A new transfer may use the slot.
    free: AtomicBool,
}

impl<R, E> Seat<R, E> {
    pub(super) fn new(replies: R) -> Self {
        let seat = Self { outcome: ArrayQueue::new(1), replies: ArrayQueue::new(1), free: AtomicBool::new(true) };
        seat.give_back(replies);
        seat
    }

    /// Nobody reads a reply any more, or there is none.
    pub(super) fn give_back(&self, replies: R) {
        let _ = self.replies.push(replies);
    }

    /// On the application's thread: whether a transfer may begin, and the slot be written.
    pub(super) fn is_free(&self) -> bool {
        self.free.load(Ordering::Acquire) && !self.replies.is_empty()
    }

    /// On the application's thread: begins a transfer, of a free seat.
    pub(super) fn begin(&self) -> Option<R> {
        let replies = self.replies.pop()?;
        self.take();
        Some(replies)
    }

    /// On the application's thread: begins a transfer without replies, of a free seat.
    pub(super) fn take(&self) {
        self.free.store(false, Ordering::Relaxed);
    }

    /// On the application's thread: how the transfer ended, once.
    pub(super) fn outcome(&self) -> Option<Result<R, E>> {
        self.outcome.pop()
    }

    /// On the progress thread: nothing reads or writes the slot any more.
    pub(super) fn vacate(&self) {
        self.free.store(true, Ordering::Release);
    }

    /// On the progress thread: the transfer has ended.
    pub(super) fn end(&self, outcome: Result<R, E>) {
        let _ = self.outcome.push(outcome);
    }
}
