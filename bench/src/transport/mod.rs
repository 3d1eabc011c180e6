//! The transport suite: round trips and streams over a provider, each next to the machine's floor of the same moment.
//!
//! Two ends in two threads, pinned to two CPUs, exchange writes-with-immediate and spin. Before and after every row the
//! same bytes are moved by the barest means there are (module `floor`): a cache line that two cores bounce, `memcpy` into
//! shared memory, two busy-polling sockets. A row whose floor has drifted meanwhile is taken again. Over RDMA the floor
//! is perftest, and the two take turns.
//!
//! No side looks at the payload while the clock runs, as in `ib_write_lat` and `ucx_perftest`; that it arrives is
//! checked before.

mod pair;
mod pingpong;
mod report;
mod rows;
mod stream;
mod turns;

pub use report::{Floor, Line, Mode, Operation, Row};

pub(crate) use pair::{End, Pair, own, window};

use crate::compare::{Bouncer, ROUNDS, Ucx, UcxTest, beside};
use crate::drift::steadiest;
use crate::progress::{Progress, Watcher, keep, tell};
use crate::{BenchError, Cpus, Report};
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
    /// A short look, to see that everything works: a twentieth of the time, no repetition.
    pub quick: bool,
    /// The CPUs of the two ends.
    pub cpus: Cpus,
    /// How the devices are opened.
    pub device: DeviceOptions,
    /// What the round trips are compared with, in the same run.
    pub ucx: Option<Ucx>,
}

impl Options {
    /// The whole suite, without comparison.
    pub fn new(provider: Provider, cpus: Cpus) -> Self {
        Self { provider, sizes: SIZES.to_vec(), quick: false, cpus, device: DeviceOptions::default(), ucx: None }
    }

    /// How long each measurement takes.
    fn budget(&self) -> Duration {
        Duration::from_millis(match (self.quick, self.provider) {
            (false, _) => 300,
            // perftest begins without a warm-up.
            (true, Provider::Verbs) => 100,
            (true, _) => 15,
        })
    }

    /// How often a row is taken until its floor stands still.
    fn attempts(&self) -> usize {
        if self.quick { 1 } else { 3 }
    }

    /// How often ours and a floor that drifts take turns.
    fn turns(&self) -> usize {
        if self.quick { 2 } else { 5 }
    }

    /// How often ours and a peer take turns.
    fn rounds(&self) -> usize {
        if self.quick { 1 } else { ROUNDS }
    }
}

/// Runs the suite into `report`. What was measured before an error, or before `progress` said to stop, is there.
///
/// # Errors
/// When the provider cannot be opened or connected on this machine, when a link ends meanwhile, when what was sent does
/// not arrive, when a peer's program cannot be run, or when `progress` says to stop.
pub fn run(options: &Options, report: &mut Report<Line>, progress: Watcher<'_, Line>) -> Result<(), BenchError> {
    let mut run = Run { options, pair: Pair::connect(options.provider, &options.device, &options.sizes)?, progress };
    let plans = rows::plan(options.provider, &options.sizes);
    let peers = options.ucx.as_ref().filter(|_| Ucx::speaks(options.provider));
    let of = plans.len() + peers.map_or(0, |_| options.sizes.len());
    for (number, plan) in plans.iter().enumerate() {
        let row = run.row(plan, number, of)?;
        keep(report, run.progress, Line::Row(row))?;
    }
    if let Some(ucx) = peers {
        for (index, &bytes) in options.sizes.iter().enumerate() {
            tell(run.progress, Progress::Taking { number: plans.len() + index, of, attempt: 1 })?;
            let peers = UcxTest::ALL.map(|test| Bouncer::Ucx(ucx.clone(), test));
            let (cpus, budget) = (options.cpus, options.budget());
            for comparison in beside(&mut run.pair, &peers, bytes, cpus, budget, options.rounds())? {
                keep(report, run.progress, Line::Comparison(comparison?))?;
            }
        }
    }
    report.machine.look_again();
    Ok(())
}

struct Run<'a> {
    options: &'a Options,
    pair: Pair,
    progress: Watcher<'a, Line>,
}

impl Run<'_> {
    /// A row, taken again while its floor drifts; the steadiest counts.
    fn row(&mut self, plan: &rows::Plan, number: usize, of: usize) -> Result<Row, BenchError> {
        let options = self.options;
        steadiest(
            options.attempts(),
            |row: &Row| row.drift,
            |attempt| {
                tell(self.progress, Progress::Taking { number, of, attempt })?;
                let (pair, cpus, budget) = (&mut self.pair, options.cpus, options.budget());
                match options.provider {
                    Provider::Verbs => turns::take(plan, pair, cpus, budget, options.turns(), attempt),
                    _ => rows::take(plan, pair, cpus, budget, attempt),
                }
            },
        )
    }
}
