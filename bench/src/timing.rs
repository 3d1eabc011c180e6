//! Round trips and steps of a stream, timed into histograms.

use crate::BenchError;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Below this a round is not timed alone: reading the clock would be a good part of it.
const CLOCK_IS_CHEAP: Duration = Duration::from_micros(1);
/// Rounds that are timed together then.
const TOGETHER: u32 = 16;

/// What stands for a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Statistic {
    /// Its middle.
    Median,
    /// All time / all rounds.
    Mean,
}

/// The middle, the tail and the mean of a distribution.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Timing {
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) mean_us: f64,
}

impl Timing {
    /// What stands for all.
    pub(crate) fn told_by(&self, statistic: Statistic) -> f64 {
        match statistic {
            Statistic::Median => self.p50_us,
            Statistic::Mean => self.mean_us,
        }
    }

    /// One after the other.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            p50_us: self.p50_us + other.p50_us,
            p99_us: self.p99_us + other.p99_us,
            mean_us: self.mean_us + other.mean_us,
        }
    }

    /// One way of a round trip that takes this.
    pub(crate) fn halved(self) -> Self {
        Self { p50_us: self.p50_us / 2.0, p99_us: self.p99_us / 2.0, mean_us: self.mean_us / 2.0 }
    }
}

/// The tail of a distribution.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) max_us: f64,
}

/// Durations of steps, to three digits.
pub(crate) struct Times(Histogram<u64>);

impl Times {
    pub(crate) fn new() -> Result<Self, BenchError> {
        // Up to a minute; longer counts as a minute.
        Ok(Self(Histogram::new_with_bounds(1, 60_000_000_000_000, 3)?))
    }

    /// Records `count` steps that took `time` together.
    pub(crate) fn record(&mut self, time: Duration, count: u32) {
        // Picoseconds, so that a few nanoseconds still have three digits.
        self.0.saturating_record((time.as_nanos() * 1000 / u128::from(count.max(1))) as u64);
    }

    pub(crate) fn timing(&self) -> Timing {
        let at = |quantile| microseconds(&self.0, quantile);
        Timing { p50_us: at(0.5), p99_us: at(0.99), mean_us: self.0.mean() / 1e6 }
    }

    /// The tail as those would have met it who come every `interval_us`, whether the one before is done or not: a step
    /// that takes ten intervals has kept nine others waiting, which the caller did not start meanwhile.
    pub(crate) fn tail(&self, interval_us: f64) -> Tail {
        let all = self.0.clone_correct((interval_us * 1e6) as u64);
        let at = |quantile| microseconds(&all, quantile);
        Tail { p90_us: at(0.9), p99_us: at(0.99), p999_us: at(0.999), max_us: at(1.0) }
    }

    /// How many were recorded.
    pub(crate) fn count(&self) -> u64 {
        self.0.len()
    }
}

fn microseconds(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1e6
}

/// What [`measure_all`] found.
pub(crate) struct Measured {
    /// Of single rounds.
    pub(crate) singles: Times,
    /// The middle and the mean as [`measure`] says, the tail of single rounds.
    pub(crate) timing: Timing,
}

/// Calls `round` for a while after a warm-up. The median of rounds faster than a microsecond is that of the means of 16
/// in a row, and the mean is that of all of these; the tail is always of single rounds.
pub(crate) fn measure(budget: Duration, round: impl FnMut() -> Result<(), BenchError>) -> Result<Timing, BenchError> {
    Ok(measure_all(budget, round)?.timing)
}

/// As [`measure`], with all single rounds.
pub(crate) fn measure_all(
    budget: Duration,
    mut round: impl FnMut() -> Result<(), BenchError>,
) -> Result<Measured, BenchError> {
    let mut singles = Times::new()?;
    repeat(budget / 4, 1, &mut singles, &mut round)?;
    let fast = singles.timing().p50_us < CLOCK_IS_CHEAP.as_secs_f64() * 1e6;
    singles = Times::new()?;
    repeat(budget, 1, &mut singles, &mut round)?;
    let mut timing = singles.timing();
    if fast {
        let mut blocks = Times::new()?;
        repeat(budget, TOGETHER, &mut blocks, &mut round)?;
        timing = Timing { p99_us: timing.p99_us, ..blocks.timing() };
    }
    Ok(Measured { singles, timing })
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

#[cfg(test)]
mod tests {
    use super::Times;
    use std::time::Duration;

    #[test]
    fn a_pause_counts_for_all_whom_it_kept_waiting() {
        let mut times = Times::new().expect("a histogram");
        (0..990).for_each(|_| times.record(Duration::from_micros(10), 1));
        times.record(Duration::from_millis(10), 1);
        assert!(times.timing().p99_us < 11.0);
        // A thousand more would have come in those 10 ms, every 10 µs, and waited half of it on average.
        let tail = times.tail(10.0);
        assert!((7_900.0..8_100.0).contains(&tail.p90_us), "{tail:?}");
        assert!((9_900.0..10_100.0).contains(&tail.max_us), "{tail:?}");
    }
}
