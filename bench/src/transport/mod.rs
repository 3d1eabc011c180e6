//! The transport suite: round trips and streams over a provider, each next to the machine's floor of the same moment.
//!
//! Two ends in two threads, pinned to two CPUs, exchange writes-with-immediate and spin. Before and after every row the
//! same bytes are moved by the barest means there are (module `floor`): a cache line that two cores bounce, `memcpy` into
//! shared memory, two busy-polling sockets. A row whose floor has drifted meanwhile is taken again.
//!
//! No side looks at the payload while the clock runs, as in `ib_write_lat` and `ucx_perftest`; that it arrives is
//! checked before.

mod cpus;
mod error;
mod floor;
mod pair;
mod pingpong;
mod report;
mod rows;
mod stream;
mod timing;

pub use cpus::Machine;
pub use error::BenchError;
pub use report::{Drift, Floor, Mode, Operation, Report, Row};

use cpus::Cpus;
use pair::Pair;
use std::time::Duration;
use stepmesh_transport::{DeviceOptions, Provider};

/// The sizes of the suite: a flag, a line, a page, a hidden state of one token, and the transfers of AFD.
pub const SIZES: [usize; 7] = [8, 64, 4 << 10, 7 << 10, 64 << 10, 896 << 10, 1792 << 10];

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Over which provider.
    pub provider: Provider,
    /// Bytes of each transfer; streams take those from 64 KiB on.
    pub sizes: Vec<usize>,
    /// A short look, to see that everything works: a tenth of the time, no repetition.
    pub quick: bool,
    /// The CPUs of the two ends; none: the first two that this process may use.
    pub cpus: Option<[usize; 2]>,
    /// How the devices are opened.
    pub device: DeviceOptions,
    /// The command line that asks, for the report.
    pub command: String,
}

impl Options {
    /// The whole suite.
    pub fn new(provider: Provider) -> Self {
        Self {
            provider,
            sizes: SIZES.to_vec(),
            quick: false,
            cpus: None,
            device: DeviceOptions::default(),
            command: format!("stepmesh bench transport --provider {provider}"),
        }
    }

    /// How long each measurement takes.
    fn budget(&self) -> Duration {
        Duration::from_millis(if self.quick { 15 } else { 300 })
    }

    /// How often a row is taken until its floor stands still.
    fn attempts(&self) -> usize {
        if self.quick { 1 } else { 3 }
    }
}

/// How far a run has come.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// A row is being taken, for the `attempt`th time.
    Taking {
        /// From 0.
        number: usize,
        /// Rows in all.
        of: usize,
        /// From 1.
        attempt: usize,
    },
    /// A row is done.
    Done(&'a Row),
}

/// Runs the suite.
///
/// # Errors
/// When the provider cannot be opened or connected on this machine, when a link ends meanwhile, when what was sent does
/// not arrive, or when there are fewer than two CPUs to spin on.
pub fn run(options: &Options, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Report, BenchError> {
    let cpus = Cpus::choose(options.cpus)?;
    let plans = rows::plan(options.provider, &options.sizes);
    let mut pair = Pair::connect(options.provider, &options.device, &options.sizes)?;
    let mut results = Vec::with_capacity(plans.len());
    for (number, plan) in plans.iter().enumerate() {
        let mut best: Option<Row> = None;
        for attempt in 1..=options.attempts() {
            progress(Progress::Taking { number, of: plans.len(), attempt });
            let row = rows::take(plan, &mut pair, cpus, options.budget(), attempt)?;
            let steady = row.drift.is_steady();
            if best.as_ref().is_none_or(|best| row.drift.share < best.drift.share) {
                best = Some(row);
            }
            if steady {
                break;
            }
        }
        let Some(row) = best else { continue };
        progress(Progress::Done(&row));
        results.push(row);
    }
    Ok(Report { machine: Machine::describe(cpus), command: options.command.clone(), results })
}
