//! The mesh suite: whole `push_pull` round trips with the paper's payloads, each next to the machine's floor.
//!
//! Two threads, pinned to two CPUs, drive the members of the two sides; the members are joined by a scheduler within the
//! process, so that the path of a transfer is what it is between processes. One round is acquire, `push_pull`,
//! `next_batch`, `respond`, wait.

mod deployment;
mod ends;
mod ffn;
mod members;
mod payload;
mod play;
mod rounds;
mod row;
mod scaling;
mod turns;

pub use members::{MemberRole, play};
pub use row::{Budget, Cpu, Floor, Row};
pub use scaling::{Driver, MEMBERS, ScalingOptions, ScalingRow, run_scaling};
pub use turns::Turns;

use crate::drift::steadiest;
use crate::progress::{Progress, Watcher, keep, tell};
use crate::transport::Mode;
use crate::{BenchError, Cpus, Report};
use payload::Payload;
use serde::Serialize;
use std::fmt;
use std::time::Duration;
use stepmesh_transport::{DeviceOptions, Provider};

/// Tokens of a transfer: the sweep, with the paper's 128 in it.
pub const BATCHES: [u32; 6] = [1, 8, 32, 128, 256, 512];

/// Who drives a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// The thread that uses it, polling without pause.
    Caller,
    /// A progress thread of its own.
    Threaded,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Caller => "caller",
            Self::Threaded => "threaded",
        })
    }
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Over which provider.
    pub provider: Provider,
    /// Attention instances, all driven by one thread.
    pub attention: u32,
    /// FFN instances, all driven by the other.
    pub ffn: u32,
    /// Tokens of each transfer.
    pub batches: Vec<u32>,
    /// Bytes of one tensor there and of one back, besides.
    pub plain: Vec<[u32; 2]>,
    /// Where tensors are produced.
    pub modes: Vec<Mode>,
    /// Who drives the members.
    pub engines: Vec<Engine>,
    /// Requests of each attention instance under way at once.
    pub microbatches: u16,
    /// How long an FFN instance computes.
    pub ffn_time: Duration,
    /// A short look, to see that everything works.
    pub quick: bool,
    /// The CPUs of the two sides.
    pub cpus: Cpus,
    /// How the devices are opened.
    pub device: DeviceOptions,
}

impl Options {
    /// 1A1F, the whole sweep, an FFN that answers at once, one request at a time.
    pub fn new(provider: Provider, cpus: Cpus) -> Self {
        Self {
            provider,
            attention: 1,
            ffn: 1,
            batches: BATCHES.to_vec(),
            plain: Vec::new(),
            modes: vec![Mode::InPlace, Mode::Copy],
            engines: vec![Engine::Caller],
            microbatches: 1,
            ffn_time: Duration::ZERO,
            quick: false,
            cpus,
            device: DeviceOptions::default(),
        }
    }

    /// How long each measurement takes.
    fn budget(&self) -> Duration {
        Duration::from_millis(if self.quick { 15 } else { 300 })
    }

    fn attempts(&self) -> usize {
        if self.quick { 1 } else { 3 }
    }

    /// Rounds in which ours and another program take turns: of one and the same row some differ by a third.
    fn rounds(&self) -> usize {
        if self.quick { 1 } else { 15 }
    }

    fn payloads(&self) -> Vec<Payload> {
        let plain = self.plain.iter().copied().map(Payload::plain);
        self.batches.iter().copied().map(Payload::new).chain(plain).collect()
    }
}

/// One row to be taken.
#[derive(Clone, Debug)]
struct Plan {
    engine: Engine,
    mode: Mode,
    payload: Payload,
}

/// The median of rounds with one tensor of so many bytes there and one back.
pub(crate) fn plain_round_us(
    provider: Provider,
    device: &DeviceOptions,
    bytes: [u32; 2],
    mode: Mode,
    cpus: Cpus,
    quick: bool,
) -> Result<f64, BenchError> {
    let options = Options { quick, device: device.clone(), ..Options::new(provider, cpus) };
    let plan = Plan { engine: Engine::Caller, mode, payload: Payload::plain(bytes) };
    row::round_us(&options, &plan)
}

/// Runs the suite into `report`. What was measured before an error, or before `progress` said to stop, is there.
///
/// # Errors
/// When the provider cannot be opened on this machine, when the members do not find each other, when a link ends
/// meanwhile, when what was sent does not arrive, or when `progress` says to stop.
pub fn run(options: &Options, report: &mut Report<Row>, progress: Watcher<'_, Row>) -> Result<(), BenchError> {
    let mut plans = Vec::new();
    for &engine in &options.engines {
        for payload in options.payloads() {
            plans.extend(options.modes.iter().map(|&mode| Plan { engine, mode, payload: payload.clone() }));
        }
    }
    let of = plans.len();
    for (number, plan) in plans.iter().enumerate() {
        let mut take = |attempt| {
            tell(progress, Progress::Taking { number, of, attempt })?;
            match options.provider {
                Provider::Verbs => rounds::take(options, plan, attempt),
                _ => row::take(options, plan, attempt),
            }
        };
        let row = steadiest(options.attempts(), |row: &Row| row.drift, &mut take)?;
        keep(report, progress, row)?;
    }
    report.machine.look_again();
    Ok(())
}
