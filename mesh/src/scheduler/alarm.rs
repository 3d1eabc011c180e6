//! When the state wants to be woken: the earliest of many deadlines, kept lazily.
//!
//! Deadlines that move away (a heartbeat came) do not touch the alarm; it rings early, and whoever is woken sets it
//! anew from what is still due. So a heartbeat costs nothing, and an idle scheduler sleeps.

use std::time::Instant;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Alarm(Option<Instant>);

impl Alarm {
    /// Rings at `at` or before.
    pub(super) fn at_latest(&mut self, at: Instant) {
        self.0 = Some(self.0.map_or(at, |set| set.min(at)));
    }

    /// Whether it rings; if so, it is off until it is set anew.
    pub(super) fn rings(&mut self, now: Instant) -> bool {
        let rings = self.0.is_some_and(|set| set <= now);
        if rings {
            self.0 = None;
        }
        rings
    }

    pub(super) fn when(self) -> Option<Instant> {
        self.0
    }
}
