//! The rows of the suite: what each measures, and which floor it stands on.

use super::pair::Pair;
use super::report::{Floor, Row};
use super::{Mode, Operation, pingpong, stream};
use crate::floor::{self, Arena, Places};
use crate::timing::Timing;
use crate::{BenchError, Cpus, Drift};
use std::time::Duration;
use stepmesh_transport::Provider;

/// Streams of smaller transfers are not taken.
const STREAMED: usize = 64 << 10;
/// From here on the bytes count in a round trip over shared memory.
const MORE_THAN_LINES: usize = 128;
/// From here on it makes a difference whether they are in a cache.
const CACHED: usize = 64 << 10;

/// What a row measures.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) op: Operation,
    pub(super) mode: Mode,
    pub(super) bytes: usize,
}

/// The rows for a provider: round trips at every size, streams of the large ones. The suite's own sizes are streamed
/// at 64 KiB and 1.75 MiB; over RDMA, where round trips of the large ones say little, at 896 KiB, too.
pub(super) fn plan(provider: Provider, sizes: &[usize]) -> Vec<Plan> {
    let modes: &[Mode] = if provider == Provider::Shm { &[Mode::Copy, Mode::InPlace] } else { &[Mode::Copy] };
    let round_trips =
        modes.iter().flat_map(|&mode| sizes.iter().map(move |&bytes| Plan { op: Operation::PingPong, mode, bytes }));
    let skipped = |bytes: &&usize| **bytes == 896 << 10 && provider != Provider::Verbs;
    let plain: &[usize] = if provider == Provider::Verbs { sizes } else { &[] };
    let plain = plain.iter().map(|&bytes| Plan { op: Operation::PingPongPlain, mode: Mode::Copy, bytes });
    let streams = [Operation::Stream, Operation::StreamBoth].into_iter().flat_map(|op| {
        let streamed = sizes.iter().filter(|bytes| **bytes >= STREAMED && !skipped(bytes));
        streamed.map(move |&bytes| Plan { op, mode: Mode::Copy, bytes })
    });
    plain.chain(round_trips).chain(streams).collect()
}

/// Takes a row between two measurements of its floor.
pub(super) fn take(
    plan: &Plan,
    pair: &mut Pair,
    cpus: Cpus,
    budget: Duration,
    attempt: usize,
) -> Result<Row, BenchError> {
    let &Plan { op, mode, bytes } = plan;
    pair.check(mode, bytes)?;
    let (name, before) = bare(plan, pair, cpus, budget)?;
    let ours = plan.measure(pair, cpus, budget, Figure::stream)?;
    let (_, after) = bare(plan, pair, cpus, budget)?;
    let drift = Drift::new(before.judged(op), after.judged(op), attempt);
    let floor = before.mean(&after).floor(name, op, &ours);
    let cold = match (pair.provider, mode) {
        (Provider::Shm, Mode::Copy) if bytes >= CACHED => {
            let timing = Arena::allocate(&pair.ends[0])?.copies(cpus, bytes, budget / 2)?;
            let cold = match op {
                Operation::PingPong | Operation::PingPongPlain => Figure::round_trip(timing.plus(timing), bytes),
                Operation::Stream => Figure::stream(&[timing], bytes),
                Operation::StreamBoth => Figure::stream(&[timing, timing], bytes),
            };
            Some(cold.floor("memcpy_cold", op, &ours))
        }
        _ => None,
    };
    Ok(Row { cold, ..plan.row(pair.provider, &ours, floor, drift) })
}

impl Plan {
    /// Ours; what a stream comes to is the floor's to say.
    pub(super) fn measure(
        &self,
        pair: &mut Pair,
        cpus: Cpus,
        budget: Duration,
        stream: fn(&[Timing], usize) -> Figure,
    ) -> Result<Figure, BenchError> {
        let &Self { op, mode, bytes } = self;
        Ok(match op {
            Operation::PingPongPlain => Figure::round_trip(pingpong::play_plain(pair, cpus, bytes, budget)?, bytes),
            Operation::PingPong => Figure::round_trip(pingpong::play(pair, cpus, mode, bytes, budget)?, bytes),
            Operation::Stream => stream(&stream::flow(pair, cpus, bytes, false, budget)?, bytes),
            Operation::StreamBoth => stream(&stream::flow(pair, cpus, bytes, true, budget)?, bytes),
        })
    }

    /// The row, as far as every floor gives one.
    pub(super) fn row(&self, provider: Provider, ours: &Figure, floor: Floor, drift: Drift) -> Row {
        let &Self { op, mode, bytes } = self;
        Row {
            provider,
            op,
            mode,
            bytes,
            p50_us: ours.timing.p50_us,
            p99_us: ours.timing.p99_us,
            gbytes_per_s: ours.gbytes_per_s,
            ratio: floor.ratio,
            floor,
            drift,
            cold: None,
            rounds: Vec::new(),
        }
    }
}

/// The floor of a row.
fn bare(plan: &Plan, pair: &Pair, cpus: Cpus, budget: Duration) -> Result<(&'static str, Figure), BenchError> {
    let &Plan { op, mode, bytes } = plan;
    let both = op == Operation::StreamBoth;
    Ok(match (pair.provider, op, mode) {
        (Provider::Shm, Operation::PingPong, Mode::Copy) if bytes > MORE_THAN_LINES => {
            let line = floor::bounce(cpus, budget / 2)?;
            let copies = floor::copies(&pair.ends, cpus, bytes, Places::One, false, budget / 2)?;
            let sum = copies.first().map_or(line, |&copy| line.plus(copy).plus(copy));
            ("cache_line+2*memcpy", Figure::round_trip(sum, bytes))
        }
        (Provider::Shm, Operation::PingPong, _) => {
            ("cache_line", Figure::round_trip(floor::bounce(cpus, budget)?, bytes))
        }
        (Provider::Shm, ..) => {
            let copies = floor::copies(&pair.ends, cpus, bytes, Places::Window, both, budget)?;
            ("memcpy_warm", Figure::stream(&copies, bytes))
        }
        (_, Operation::PingPong | Operation::PingPongPlain, _) => {
            ("socket_pair", Figure::round_trip(floor::exchange(cpus, [bytes; 2], 1, budget)?, bytes))
        }
        _ => ("socket_pair", Figure::stream(&floor::pump(cpus, bytes, both, budget)?, bytes)),
    })
}

/// What was measured, ours or a floor's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figure {
    pub(super) timing: Timing,
    pub(super) gbytes_per_s: f64,
}

impl Figure {
    pub(super) fn round_trip(timing: Timing, bytes: usize) -> Self {
        Self { timing, gbytes_per_s: rate(2 * bytes, timing) }
    }

    /// As [`Figure::stream`], with the bandwidths of the whole time instead of the median's.
    pub(super) fn whole_stream(directions: &[Timing], bytes: usize) -> Self {
        let mean = |timing: &Timing| Timing { p50_us: timing.mean_us, ..*timing };
        let gbytes_per_s = directions.iter().map(|timing| rate(bytes, mean(timing))).sum();
        Self { gbytes_per_s, ..Self::stream(directions, bytes) }
    }

    /// The bandwidths of all directions together; the times of the slower.
    fn stream(directions: &[Timing], bytes: usize) -> Self {
        let slower = |a: Timing, b: Timing| if a.p50_us < b.p50_us { b } else { a };
        let timing = directions.iter().copied().reduce(slower).unwrap_or_default();
        Self { timing, gbytes_per_s: directions.iter().map(|&timing| rate(bytes, timing)).sum() }
    }

    fn mean(&self, other: &Self) -> Self {
        let timing = self.timing.plus(other.timing);
        Self {
            timing: Timing { p50_us: timing.p50_us / 2.0, p99_us: timing.p99_us / 2.0, mean_us: timing.mean_us / 2.0 },
            gbytes_per_s: (self.gbytes_per_s + other.gbytes_per_s) / 2.0,
        }
    }

    /// What rows of `op` are judged by.
    pub(super) fn judged(&self, op: Operation) -> f64 {
        if matches!(op, Operation::PingPong | Operation::PingPongPlain) {
            self.timing.p50_us
        } else {
            self.gbytes_per_s
        }
    }

    pub(super) fn floor(&self, name: &'static str, op: Operation, ours: &Self) -> Floor {
        let ratio = ours.judged(op) / self.judged(op);
        match op {
            Operation::PingPong | Operation::PingPongPlain => {
                Floor { name, p50_us: Some(self.timing.p50_us), gbytes_per_s: None, ratio }
            }
            _ => Floor { name, p50_us: None, gbytes_per_s: Some(self.gbytes_per_s), ratio },
        }
    }
}

/// 10⁹ bytes a second.
fn rate(bytes: usize, timing: Timing) -> f64 {
    if timing.p50_us > 0.0 { bytes as f64 / timing.p50_us / 1e3 } else { 0.0 }
}
