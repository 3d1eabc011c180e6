//! The time that a core is driven by: the machine's, or a test's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A source of monotonic time. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Clock {
    origin: Instant,
    manual: Option<Arc<AtomicU64>>,
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl Clock {
    /// The machine's monotonic clock.
    pub fn system() -> Self {
        Self { origin: Instant::now(), manual: None }
    }

    /// A clock that stands still until [`Clock::advance`] moves it.
    pub fn manual() -> Self {
        Self { origin: Instant::now(), manual: Some(Arc::new(AtomicU64::new(1))) }
    }

    /// Whether the clock is moved by hand.
    pub fn is_manual(&self) -> bool {
        self.manual.is_some()
    }

    /// Now.
    pub fn now(&self) -> Instant {
        match &self.manual {
            Some(elapsed_ns) => self.origin + Duration::from_nanos(elapsed_ns.load(Ordering::Acquire)),
            None => Instant::now(),
        }
    }

    /// Nanoseconds of `CLOCK_MONOTONIC`, which all processes of one host share; a manual clock counts from its start.
    pub fn now_ns(&self) -> u64 {
        match &self.manual {
            Some(elapsed_ns) => elapsed_ns.load(Ordering::Acquire),
            None => {
                let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
                time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
            }
        }
    }

    /// Moves a manual clock forward; does nothing to the machine's.
    pub fn advance(&self, by: Duration) {
        if let Some(elapsed_ns) = &self.manual {
            elapsed_ns.fetch_add(by.as_nanos() as u64, Ordering::AcqRel);
        }
    }
}
