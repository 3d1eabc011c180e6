//! The pipeline suite: the executors that the daemons run, with stages that only take their time and a wire that takes
//! its own, against what the times allow.
//!
//! Attention and FFN are two processes (or threads) with members of their own over a real provider, pinned to two CPUs. A
//! stage sleeps most of its time and spins the rest; the wire holds arrivals back from when they were posted on, so that it
//! runs while either side computes. By the virtual clock the same executors run over the simulated network, and software takes no time:
//! what is left is what the schedule makes of the stages.

mod bare;
mod board;
mod ffn_process;
mod front;
mod row;
mod side;
mod stages;
mod threads;
mod turns;
mod wire;
mod world;

pub use ffn_process::{FfnRole, serve};
pub use row::{Clock, Cores, Floor, Row, StallShare};

use crate::progress::{Progress, Watcher, keep, tell};
use crate::{BenchError, Cpus, Program, Report, Scheduling};
use std::time::Duration;
use stepmesh_pipeline::{Overhead, Stages};
use stepmesh_transport::{DeviceOptions, Provider};
use world::World;

/// Layers of Step-3.
pub const LAYERS: u32 = 61;
/// A stage's time at 20 tokens a second over 61 layers.
pub const STAGE: Duration = Duration::from_micros(272);

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Over which provider; `mem` by the virtual clock.
    pub provider: Provider,
    /// What the time is taken by.
    pub clock: Clock,
    /// The points, all with as many layers.
    pub points: Vec<Stages>,
    /// How often each is run; the median counts.
    pub runs: usize,
    /// Tokens of a run that are timed: over a second, so that each run meets as much of what a machine does besides.
    pub tokens: u32,
    /// How threads whose stages sleep are scheduled, by the machine's clock: an ordinary one is late when its CPU has
    /// something else to do, as a GPU that computes would not be.
    pub scheduling: Scheduling,
    /// The CPUs of the two sides.
    pub cpus: Cpus,
    /// How the devices are opened.
    pub device: DeviceOptions,
    /// What runs as the FFN side's process, by [`serve`]; both sides are threads of this one if there is none.
    pub ffn: Option<Program>,
}

impl Options {
    /// Equal stages with and without slack, imbalance, and a wire that grows beyond what three microbatches hide.
    pub fn new(provider: Provider, cpus: Cpus) -> Self {
        let us = Duration::from_micros;
        let point = |attention, ffn, wire, microbatches| Stages {
            attention: us(attention),
            ffn: us(ffn),
            wire: us(wire),
            microbatches,
            layers: LAYERS,
        };
        let mut points = vec![point(272, 272, 272, 3), point(250, 250, 272, 3)];
        points.extend([(200, 272), (272, 200)].map(|(attention, ffn)| point(attention, ffn, 272, 3)));
        points.extend([0, 136, 408, 544].map(|wire| point(272, 272, wire, 3)));
        points.extend([0, 272].map(|wire| point(272, 272, wire, 2)));
        Self {
            provider,
            clock: Clock::Wall,
            points,
            runs: 5,
            tokens: 24,
            scheduling: Scheduling::best(),
            cpus,
            device: DeviceOptions::default(),
            ffn: None,
        }
    }

    /// By the virtual clock: always the same, so once is enough, and nothing of it is this machine's.
    pub fn by_virtual_clock(&mut self) {
        (self.provider, self.clock, self.runs, self.tokens) = (Provider::Mem, Clock::Virtual, 1, 64);
    }

    /// How threads whose stages sleep are scheduled at a point: none by the virtual clock, nor where both stages are too short.
    pub fn scheduling_of(&self, point: &Stages) -> Option<Scheduling> {
        let some = self.clock == Clock::Wall && (stages::sleeps(point.attention) || stages::sleeps(point.ffn));
        some.then_some(self.scheduling)
    }

    /// A short look, to see that everything works.
    pub fn quick(&mut self) {
        (self.runs, self.tokens) = (1, 2);
    }
}

/// Runs the suite into `report`. What was measured before an error, or before `progress` said to stop, is there.
///
/// # Errors
/// When the provider cannot be opened on this machine, when the members do not find each other, when a sequence is not
/// decoded, when threads may not be scheduled as asked for, or when `progress` says to stop.
pub fn run(options: &Options, report: &mut Report<Row>, progress: Watcher<'_, Row>) -> Result<(), BenchError> {
    if options.clock == Clock::Wall {
        options.scheduling.check()?;
    }
    let mut world: Option<(World, u16, Overhead)> = None;
    for (number, stages) in options.points.iter().enumerate() {
        tell(progress, Progress::Taking { number, of: options.points.len(), attempt: 1 })?;
        // Another has to be gone: its threads spin on the same two CPUs.
        let same = world.take().filter(|(_, microbatches, _)| *microbatches == stages.microbatches);
        let (world, _, overhead) = match same {
            Some(same) => world.insert(same),
            None => {
                let overhead = overhead(options, stages.microbatches)?;
                let fresh = World::start(options, stages.layers, stages.microbatches)?;
                world.insert((fresh, stages.microbatches, overhead))
            }
        };
        let row = row::take(options, world, stages, *overhead)?;
        keep(report, progress, row)?;
    }
    report.machine.look_again();
    Ok(())
}

/// What software and machine add to stages as long as the budget's, behind which nothing is in the caches any more: of one
/// microbatch a layer's round over a wire that takes no time, of several what a busy side does for each.
fn overhead(options: &Options, microbatches: u16) -> Result<Overhead, BenchError> {
    if options.clock == Clock::Virtual {
        return Ok(Overhead { per_round: Duration::ZERO, per_microbatch: Duration::ZERO });
    }
    let added = |microbatches: u16, ffn: Duration| {
        let stages = Stages { attention: STAGE, ffn, wire: Duration::ZERO, microbatches, layers: LAYERS };
        let mut world = World::start(options, LAYERS, microbatches)?;
        let token = world.run(&stages, options.tokens)?.token;
        Ok::<_, BenchError>(token.saturating_sub(stages.ideal()) / LAYERS)
    };
    Ok(Overhead {
        per_round: added(1, STAGE)?,
        per_microbatch: added(microbatches, Duration::ZERO)? / u32::from(microbatches),
    })
}
