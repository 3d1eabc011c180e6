//! What a transfer costs as a deployment grows: one thread drives all members in turn, so that nothing but their work is
//! counted.

use super::Turns;
use crate::progress::{Progress, Watcher, keep, tell};
use crate::timing::Times;
use crate::{BenchError, Report};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::fmt;
use std::time::{Duration, Instant};
use stepmesh_transport::Provider;

/// Attention instances, and as many FFN instances: 1A1F to 16A16F.
pub const MEMBERS: [u32; 5] = [1, 2, 4, 8, 16];

/// What is measured.
#[derive(Clone, Debug)]
pub struct ScalingOptions {
    /// Over which providers.
    pub providers: Vec<Provider>,
    /// Instances of each side.
    pub members: Vec<u32>,
    /// A short look, to see that everything works.
    pub quick: bool,
}

impl Default for ScalingOptions {
    /// Over the simulated network, which takes no time, and over shared memory.
    fn default() -> Self {
        Self { providers: vec![Provider::Mem, Provider::Shm], members: MEMBERS.to_vec(), quick: false }
    }
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct ScalingRow {
    /// Over what.
    pub provider: &'static str,
    /// Attention instances.
    pub attention: u32,
    /// FFN instances; each gets every request.
    pub ffn: u32,
    /// Requests with their replies in a round.
    pub transfers: usize,
    /// The median of a round of all members.
    pub round_us: f64,
    /// CPU time of both sides for one request and its reply.
    pub cpu_us_per_transfer: f64,
    /// The same in shares of that of the provider's first row.
    pub relative: f64,
}

/// Runs the suite into `report`. What was measured before an error, or before `progress` said to stop, is there.
///
/// # Errors
/// When a provider cannot be opened, when the members do not find each other, when a link ends meanwhile, or when
/// `progress` says to stop.
pub fn run_scaling(
    options: &ScalingOptions,
    report: &mut Report<ScalingRow>,
    progress: Watcher<'_, ScalingRow>,
) -> Result<(), BenchError> {
    let of = options.providers.len() * options.members.len();
    let mut number = 0;
    for &provider in &options.providers {
        let mut first = None;
        for &members in &options.members {
            tell(progress, Progress::Taking { number, of, attempt: 1 })?;
            number += 1;
            let mut row = take(provider, members, options.quick)?;
            row.relative = row.cpu_us_per_transfer / *first.get_or_insert(row.cpu_us_per_transfer);
            keep(report, progress, row)?;
        }
    }
    report.machine.look_again();
    Ok(())
}

fn take(provider: Provider, members: u32, quick: bool) -> Result<ScalingRow, BenchError> {
    let budget = Duration::from_millis(if quick { 20 } else { 500 });
    let mut turns = Turns::join(provider, [members; 2], 1)?;
    let until = |turns: &mut Turns, budget: Duration| {
        let (mut times, mut rounds, begin) = (Times::new()?, 0_u32, Instant::now());
        let cpu = cpu_time();
        while begin.elapsed() < budget || rounds < 3 {
            let start = Instant::now();
            turns.round()?;
            times.record(start.elapsed(), 1);
            rounds += 1;
        }
        Ok::<_, BenchError>((times, (cpu_time() - cpu) / rounds))
    };
    until(&mut turns, budget / 5)?;
    let (times, cpu) = until(&mut turns, budget)?;
    Ok(ScalingRow {
        provider: provider.name(),
        attention: members,
        ffn: members,
        transfers: turns.transfers(),
        round_us: times.timing().p50_us,
        cpu_us_per_transfer: cpu.as_secs_f64() * 1e6 / turns.transfers() as f64,
        relative: 1.0,
    })
}

/// Of this thread.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

impl ScalingRow {
    /// The head of the table that rows are lines of.
    pub const HEAD: &'static str = "provider  deployment  transfers   round µs  CPU µs a transfer  of the first";
}

/// A line of the table.
impl fmt::Display for ScalingRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { provider, attention, ffn, transfers, round_us, cpu_us_per_transfer, relative } = self;
        let deployment = format!("{attention}A{ffn}F");
        write!(
            f,
            "{provider:<9} {deployment:>10} {transfers:>10} {round_us:>10.2} {cpu_us_per_transfer:>18.3} {relative:>13.2}"
        )
    }
}
