//! What a transfer costs as a deployment grows: driven by one thread, all members in turn, nothing but their work is counted;
//! as processes of their own, what waking them costs, too.

use super::{Turns, members};
use crate::cpus::thread_time;
use crate::progress::{Progress, Watcher, keep, tell};
use crate::timing::Times;
use crate::{BenchError, Program, Report};
use serde::Serialize;
use std::fmt;
use std::time::{Duration, Instant};
use stepmesh_transport::Provider;

/// Attention instances, and as many FFN instances: 1A1F to 16A16F.
pub const MEMBERS: [u32; 5] = [1, 2, 4, 8, 16];

/// What is measured.
#[derive(Clone, Debug)]
pub struct ScalingOptions {
    /// Over which providers, and driven by whom.
    pub series: Vec<(Provider, Driver)>,
    /// What runs as a member's process, by [`play`](super::play).
    pub member: Program,
    /// Instances of each side.
    pub members: Vec<u32>,
    /// A short look, to see that everything works.
    pub quick: bool,
}

/// Who calls the members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// One thread, in turn.
    Thread,
    /// Each a process of its own, which sleeps while it waits.
    Processes,
}

impl ScalingOptions {
    /// Driven by one thread over the simulated network, which takes no time, and over shared memory; and as processes.
    pub fn new(member: Program) -> Self {
        let series =
            vec![(Provider::Mem, Driver::Thread), (Provider::Shm, Driver::Thread), (Provider::Shm, Driver::Processes)];
        Self { series, member, members: MEMBERS.to_vec(), quick: false }
    }
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct ScalingRow {
    /// Over what.
    pub provider: &'static str,
    /// By whom.
    pub driver: Driver,
    /// Attention instances.
    pub attention: u32,
    /// FFN instances; each gets every request.
    pub ffn: u32,
    /// Requests with their replies in a round.
    pub transfers: usize,
    /// The median of a round of all members; as processes, of one attention instance's with every FFN instance.
    pub round_us: f64,
    /// CPU time of both sides for one request and its reply.
    pub cpu_us_per_transfer: f64,
    /// The same in shares of that of the series' first row.
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
    let of = options.series.len() * options.members.len();
    let mut number = 0;
    for &(provider, driver) in &options.series {
        let mut first = None;
        for &members in &options.members {
            tell(progress, Progress::Taking { number, of, attempt: 1 })?;
            number += 1;
            let mut row = take(options, provider, driver, members)?;
            row.relative = row.cpu_us_per_transfer / *first.get_or_insert(row.cpu_us_per_transfer);
            keep(report, progress, row)?;
        }
    }
    report.machine.look_again();
    Ok(())
}

fn take(options: &ScalingOptions, provider: Provider, driver: Driver, members: u32) -> Result<ScalingRow, BenchError> {
    let (budget, transfers) =
        (Duration::from_millis(if options.quick { 20 } else { 500 }), (members * members) as usize);
    let (round_us, cpu) = match driver {
        Driver::Thread => in_turn(provider, members, budget)?,
        Driver::Processes => members::measure(&options.member, provider, members, 4 * budget)?,
    };
    Ok(ScalingRow {
        provider: provider.name(),
        driver,
        attention: members,
        ffn: members,
        transfers,
        round_us,
        cpu_us_per_transfer: cpu.as_secs_f64() * 1e6 / transfers as f64,
        relative: 1.0,
    })
}

/// The median of a round in microseconds, and its CPU time.
fn in_turn(provider: Provider, members: u32, budget: Duration) -> Result<(f64, Duration), BenchError> {
    let mut turns = Turns::join(provider, [members; 2], 1)?;
    let until = |turns: &mut Turns, budget: Duration| {
        let (mut times, mut rounds, begin) = (Times::new()?, 0_u32, Instant::now());
        let cpu = thread_time();
        while begin.elapsed() < budget || rounds < 3 {
            let start = Instant::now();
            turns.round()?;
            times.record(start.elapsed(), 1);
            rounds += 1;
        }
        Ok::<_, BenchError>((times, (thread_time() - cpu) / rounds))
    };
    until(&mut turns, budget / 5)?;
    let (times, cpu) = until(&mut turns, budget)?;
    Ok((times.timing().p50_us, cpu))
}

impl ScalingRow {
    /// The head of the table that rows are lines of.
    pub const HEAD: &'static str =
        "provider  driver     deployment  transfers   round µs  CPU µs a transfer  of the first";
}

/// A line of the table.
impl fmt::Display for ScalingRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { provider, attention, ffn, transfers, round_us, cpu_us_per_transfer, relative, .. } = self;
        let driver = match self.driver {
            Driver::Thread => "thread",
            Driver::Processes => "processes",
        };
        let deployment = format!("{attention}A{ffn}F");
        write!(
            f,
            "{provider:<9} {driver:<10} {deployment:>10} {transfers:>10} {round_us:>10.2} {cpu_us_per_transfer:>18.3} {relative:>13.2}"
        )
    }
}
