//! What `next_batch` waits for, as both threads see it.

use crate::Policy;
use crate::sync::{AtomicU64, Ordering};
use std::time::Duration;

/// One word: three bits for the policy, the rest for its number; zero for nothing.
pub(super) struct Ask(AtomicU64);

impl Ask {
    pub(super) const NOTHING: u64 = 0;

    pub(super) fn new() -> Self {
        Self(AtomicU64::new(Self::NOTHING))
    }

    pub(super) fn put(&self, policy: Policy) {
        let (kind, number) = match policy {
            Policy::All => (1, 0),
            Policy::Any => (2, 0),
            Policy::AtLeast(count) => (3, count as u64),
            Policy::Deadline(limit) => (4, u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX)),
        };
        self.0.store(number.min(u64::MAX >> 3) << 3 | kind, Ordering::SeqCst);
    }

    pub(super) fn withdraw(&self) {
        self.0.store(Self::NOTHING, Ordering::SeqCst);
    }

    /// What is asked for, and the word that says it.
    pub(super) fn get(&self) -> Option<(Policy, u64)> {
        let word = self.0.load(Ordering::SeqCst);
        let number = word >> 3;
        let policy = match word & 7 {
            1 => Policy::All,
            2 => Policy::Any,
            3 => Policy::AtLeast(usize::try_from(number).unwrap_or(usize::MAX)),
            4 => Policy::Deadline(Duration::from_nanos(number)),
            _ => return None,
        };
        Some((policy, word))
    }

    /// It is going to be answered. (It may have been withdrawn: then the answer waits for the next question.)
    pub(super) fn answer(&self, word: u64) {
        let _ = self.0.compare_exchange(word, Self::NOTHING, Ordering::SeqCst, Ordering::SeqCst);
    }
}
