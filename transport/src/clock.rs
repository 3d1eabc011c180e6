//! The time that a core is driven by: the machine's, or a test's.

use crate::monotonic;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CENTURY: Duration = Duration::from_secs(100 * 365 * 86_400);

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

    /// `timeout` from now; a century from now where no instant is that late.
    pub fn after(&self, timeout: Duration) -> Instant {
        let now = self.now();
        now.checked_add(timeout).unwrap_or(now + CENTURY)
    }

    /// Nanoseconds of `CLOCK_MONOTONIC`, which all processes of one host share; a manual clock counts from its start.
    pub fn now_ns(&self) -> u64 {
        match &self.manual {
            Some(elapsed_ns) => elapsed_ns.load(Ordering::Acquire),
            None => Self::monotonic_ns(),
        }
    }

    /// Nanoseconds of `CLOCK_MONOTONIC`; on one thread never less than before.
    pub fn monotonic_ns() -> u64 {
        monotonic::now_ns()
    }

    /// Moves a manual clock forward; does nothing to the machine's.
    pub fn advance(&self, by: Duration) {
        if let Some(elapsed_ns) = &self.manual {
            elapsed_ns.fetch_add(by.as_nanos() as u64, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_out_is_too_long() {
        let clock = Clock::system();
        let far = clock.after(Duration::MAX);
        assert!(far > clock.after(CENTURY / 2));
        assert!(clock.after(Duration::from_secs(1)) < far);
    }
}
