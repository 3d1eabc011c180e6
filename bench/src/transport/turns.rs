//! Rows over RDMA: ours and perftest take turns, since a fabric drifts more within a row than two floors around it show.

use super::Operation;
use super::pair::Pair;
use super::report::Row;
use super::rows::{Figure, Plan};
use crate::floor::Perftest;
use crate::timing::Timing;
use crate::{BenchError, Cpus, Drift};
use std::time::Duration;

/// Takes a row in so many rounds; the medians of the rounds count.
pub(super) fn take(
    plan: &Plan,
    pair: &mut Pair,
    cpus: Cpus,
    budget: Duration,
    rounds: usize,
    attempt: usize,
) -> Result<Row, BenchError> {
    let &Plan { op, mode, bytes } = plan;
    let devices = pair.rdma_devices.clone();
    let perftest = Perftest::new(&devices, cpus)?;
    let mut figures = Vec::with_capacity(rounds);
    pair.check(mode, bytes)?;
    for _ in 0..rounds {
        // perftest counts all of the time, not the median's.
        let ours = plan.measure(pair, cpus, budget, Figure::whole_stream)?;
        // As many as take about as long as ours.
        let count = (budget.as_secs_f64() * 1e6 / ours.timing.p50_us) as u64;
        let floor = match program(op) {
            "ib_write_bw" => {
                let both = op == Operation::StreamBoth;
                let gbytes_per_s = perftest.stream(bytes, both, count.clamp(20, 10_000))?;
                let mean_us = bytes as f64 / gbytes_per_s / 1e3;
                Figure { timing: Timing { p50_us: mean_us, p99_us: mean_us, mean_us }, gbytes_per_s }
            }
            program => Figure::round_trip(perftest.round_trips(program, bytes, count.clamp(20, 100_000))?, bytes),
        };
        figures.push((ours, floor));
    }
    let rounds: Vec<_> = figures.iter().map(|(ours, floor)| [ours.judged(op), floor.judged(op)]).collect();
    let (first, last) = rounds.split_at(rounds.len().div_ceil(2));
    let floor = |of: &[[f64; 2]]| median(of.iter().map(|[_, floor]| *floor));
    let drift = Drift::new(floor(first), if last.is_empty() { floor(first) } else { floor(last) }, attempt);
    let ours = middle(figures.iter().map(|(ours, _)| ours));
    let floor = middle(figures.iter().map(|(_, floor)| floor)).floor(program(op), op, &ours);
    Ok(Row { rounds, ..plan.row(pair.provider, &ours, floor, drift) })
}

/// Which of perftest's programs does the same.
fn program(op: Operation) -> &'static str {
    match op {
        Operation::PingPongPlain => "ib_write_lat",
        Operation::PingPong => "ib_send_lat",
        Operation::Stream | Operation::StreamBoth => "ib_write_bw",
    }
}

fn middle<'a>(figures: impl Iterator<Item = &'a Figure> + Clone) -> Figure {
    let of = |part: fn(&Figure) -> f64| median(figures.clone().map(part));
    Figure {
        timing: Timing {
            p50_us: of(|figure| figure.timing.p50_us),
            p99_us: of(|figure| figure.timing.p99_us),
            mean_us: of(|figure| figure.timing.mean_us),
        },
        gbytes_per_s: of(|figure| figure.gbytes_per_s),
    }
}

fn median(of: impl Iterator<Item = f64>) -> f64 {
    let mut of: Vec<_> = of.collect();
    of.sort_by(f64::total_cmp);
    of.get(of.len() / 2).copied().unwrap_or_default()
}
