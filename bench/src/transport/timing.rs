//! Round trips and steps of a stream, timed into histograms.

use super::BenchError;
use hdrhistogram::Histogram;
use std::time::{Duration, Instant};

/// Below this a round is not timed alone: reading the clock would be a good part of it.
const CLOCK_IS_CHEAP: Duration = Duration::from_micros(1);
/// Rounds that are timed together then.
const TOGETHER: u32 = 16;

/// The middle and the tail of a distribution.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

impl Timing {
    /// One after the other.
    pub(super) fn plus(self, other: Self) -> Self {
        Self { p50_us: self.p50_us + other.p50_us, p99_us: self.p99_us + other.p99_us }
    }
}

/// Durations of steps, to three digits.
pub(super) struct Times(Histogram<u64>);

impl Times {
    pub(super) fn new() -> Result<Self, BenchError> {
        // Up to a minute; longer counts as a minute.
        Ok(Self(Histogram::new_with_bounds(1, 60_000_000_000_000, 3)?))
    }

    /// Records `count` steps that took `time` together.
    pub(super) fn record(&mut self, time: Duration, count: u32) {
        // Picoseconds, so that a few nanoseconds still have three digits.
        self.0.saturating_record((time.as_nanos() * 1000 / u128::from(count.max(1))) as u64);
    }

    pub(super) fn timing(&self) -> Timing {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e6;
        Timing { p50_us: at(0.5), p99_us: at(0.99) }
    }
}

/// Calls `round` for a while after a warm-up. The median of rounds faster than a microsecond is that of the means of 16
/// in a row; the tail is always of single rounds.
pub(super) fn measure(
    budget: Duration,
    mut round: impl FnMut() -> Result<(), BenchError>,
) -> Result<Timing, BenchError> {
    let mut singles = Times::new()?;
    repeat(budget / 4, 1, &mut singles, &mut round)?;
    let fast = singles.timing().p50_us < CLOCK_IS_CHEAP.as_secs_f64() * 1e6;
    singles = Times::new()?;
    repeat(budget, 1, &mut singles, &mut round)?;
    let mut timing = singles.timing();
    if fast {
        let mut blocks = Times::new()?;
        repeat(budget, TOGETHER, &mut blocks, &mut round)?;
        timing.p50_us = blocks.timing().p50_us;
    }
    Ok(timing)
}

fn repeat(
    budget: Duration,
    together: u32,
    times: &mut Times,
    round: &mut impl FnMut() -> Result<(), BenchError>,
) -> Result<(), BenchError> {
    let start = Instant::now();
    let mut before = start;
    // On a busy machine an end is often not running: go on until there is something to take a median of.
    let (enough, patience) = (64, budget * 8);
    let mut count = 0;
    while before - start < budget || count < enough && before - start < patience {
        for _ in 0..together {
            round()?;
        }
        let after = Instant::now();
        times.record(after - before, together);
        before = after;
        count += 1;
    }
    Ok(())
}
