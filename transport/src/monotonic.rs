//! `CLOCK_MONOTONIC` for stamps. Where the kernel keeps it by the processor's time-stamp counter, so does each thread here, for a
//! millisecond from its last look at the kernel's: half as long a look, of which a round trip takes five.

/// Nanoseconds of `CLOCK_MONOTONIC`. On one thread never less than before.
pub(crate) fn now_ns() -> u64 {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    return counter::now_ns();
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    kernel_ns()
}

fn kernel_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod counter {
    use super::kernel_ns;
    use std::cell::Cell;
    use std::ops::Range;
    use std::sync::OnceLock;

    /// How long a thread goes by the counter: what the two run apart in that time, by some millionths of it, is less than a look takes.
    const SPAN_NS: u64 = 1_000_000;
    /// A look at the kernel's clock that took so many ticks was interrupted.
    const INTERRUPTED: u64 = 1024;
    /// A span has fewer ticks on any machine, and fewer nanoseconds in 2^-32 than a word holds.
    const MOST_TICKS: u64 = 1 << 26;
    /// A tick is a sixteenth of a nanosecond to ten: else one of the clocks was set.
    const SANE: Range<u64> = 1 << 28..10 << 32;
    /// The clock may be ahead of the kernel's by no more, for the sake of not going back.
    const AHEAD_NS: u64 = 1_000;

    /// A moment by both clocks.
    #[derive(Clone, Copy, Debug)]
    struct Anchor {
        ticks: u64,
        ns: u64,
        /// Nanoseconds a tick, in 2^-32; zero where that is not known.
        rate: u64,
    }

    impl Anchor {
        const NONE: Self = Self { ticks: 0, ns: 0, rate: 0 };

        /// The time at a later tick, if this is not too long ago.
        #[inline]
        fn at(&self, ticks: u64) -> Option<u64> {
            let elapsed = ticks.wrapping_sub(self.ticks);
            if elapsed >= MOST_TICKS || self.rate == 0 {
                return None;
            }
            let passed_ns = (elapsed * self.rate) >> 32;
            (passed_ns < SPAN_NS).then(|| self.ns + passed_ns)
        }

        /// What takes this one's place once the kernel has said the time at a later tick, if that tells a rate.
        fn followed_by(&self, ticks: u64, ns: u64) -> Option<Self> {
            let (elapsed, passed_ns) = (ticks.wrapping_sub(self.ticks), ns.saturating_sub(self.ns));
            if self.ns == 0 {
                return Some(Self { ticks, ns, rate: 0 });
            }
            if passed_ns < SPAN_NS {
                return None;
            }
            let rate = (u128::from(passed_ns) << 32).checked_div(u128::from(elapsed));
            let rate = rate.and_then(|rate| u64::try_from(rate).ok());
            Some(Self { ticks, ns, rate: rate.filter(|rate| SANE.contains(rate)).unwrap_or_default() })
        }
    }

    /// The time, as far as it may be said when this was said before.
    #[inline]
    fn not_before(said_ns: u64, ns: u64) -> u64 {
        if (ns..=ns + AHEAD_NS).contains(&said_ns) { said_ns } else { ns }
    }

    thread_local! {
        static ANCHOR: Cell<Anchor> = const { Cell::new(Anchor::NONE) };
        static SAID: Cell<u64> = const { Cell::new(0) };
    }

    fn ticks() -> u64 {
        // SAFETY: every x86-64 processor has the counter.
        unsafe { std::arch::x86_64::_rdtsc() }
    }

    #[inline]
    pub(super) fn now_ns() -> u64 {
        let ns = ANCHOR.with(|anchor| anchor.get().at(ticks()).unwrap_or_else(|| look(anchor)));
        let ns = not_before(SAID.get(), ns);
        SAID.set(ns);
        ns
    }

    #[cold]
    fn look(anchor: &Cell<Anchor>) -> u64 {
        if !is_kept_by_counter() {
            return kernel_ns();
        }
        let before = ticks();
        let ns = kernel_ns();
        let took = ticks().wrapping_sub(before);
        if took < INTERRUPTED
            && let Some(next) = anchor.get().followed_by(before + took / 2, ns)
        {
            anchor.set(next);
        }
        ns
    }

    /// Whether the kernel found the counter steady, and the same on all processors.
    fn is_kept_by_counter() -> bool {
        static IS_KEPT: OnceLock<bool> = OnceLock::new();
        const SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        *IS_KEPT.get_or_init(|| std::fs::read_to_string(SOURCE).is_ok_and(|source| source.trim() == "tsc"))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// Two ticks a nanosecond, and a millisecond after the first look.
        fn anchor() -> Anchor {
            let first = Anchor::NONE.followed_by(10_000, 5_000).unwrap();
            assert!(first.at(10_001).is_none(), "no rate is known yet");
            assert!(first.followed_by(12_000, 6_000).is_none(), "too soon to tell");
            first.followed_by(2_010_000, 1_005_000).unwrap()
        }

        #[test]
        fn time_passes_by_the_counter_for_a_span() {
            let anchor = anchor();
            for passed_ns in [0, 1, 999, 999_999] {
                assert_eq!(anchor.at(2_010_000 + 2 * passed_ns), Some(1_005_000 + passed_ns));
            }
            assert_eq!(anchor.at(2_010_000 + 2 * SPAN_NS), None);
            assert_eq!(anchor.at(0), None, "the counter has been set back");
            assert_eq!(anchor.at(u64::MAX), None);
        }

        #[test]
        fn a_clock_that_was_set_is_followed() {
            assert_eq!(anchor().followed_by(2_010_000 + (1 << 40), 2_005_000).unwrap().rate, 0);
            assert_eq!(anchor().followed_by(2_010_000, 9_005_000).unwrap().rate, 0, "the counter stands still");
            let back = anchor().followed_by(0, 2_005_000).unwrap();
            assert_eq!((back.ticks, back.rate), (0, 0), "the counter was set back");
        }

        #[test]
        fn what_was_said_is_not_taken_back_unless_it_was_far_off() {
            assert_eq!(not_before(5_000, 5_100), 5_100);
            assert_eq!(not_before(5_100, 5_000), 5_100);
            assert_eq!(not_before(5_001 + AHEAD_NS, 5_000), 5_000);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_kernels_clock_and_does_not_go_back() {
        let began = kernel_ns();
        let mut last = 0;
        while last < began + 20_000_000 {
            let (before, now, after) = (kernel_ns(), now_ns(), kernel_ns());
            // Five microseconds are a hundred times what was ever seen.
            assert!(before <= now + 5_000 && now <= after + 5_000, "{before} {now} {after}");
            assert!(last <= now);
            last = now;
        }
    }
}
