//! A point of the pipeline suite: what was measured, what the times allow, what the model predicts.

use super::world::World;
use super::{Options, bare};
use crate::{BenchError, Scheduling};
use serde::Serialize;
use std::fmt;
use std::time::Duration;
use stepmesh_pipeline::{Bound, Overhead, Stages};

/// What a time was measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// The machine's.
    Wall,
    /// A simulation's.
    Virtual,
}

/// Shares of the time in which a side did not compute.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StallShare {
    /// Of the attention side.
    pub attention: f64,
    /// Of the FFN side.
    pub ffn: f64,
}

/// Cores that a side used: CPU time by time. Stages sleep most of theirs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cores {
    /// Of the attention side.
    pub attention: f64,
    /// Of the FFN side.
    pub ffn: f64,
}

/// The same stages with nothing of ours between them, in turn with the runs.
#[derive(Clone, Debug, Serialize)]
pub struct Floor {
    /// What it is: two threads that tell each other by words in memory.
    pub name: &'static str,
    /// Time per output token, the median of as many runs.
    pub tpot_us: f64,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What it was measured by.
    pub clock: Clock,
    /// What the two sides are: `processes`, `threads`, or `turns` of one thread.
    pub sides: &'static str,
    /// How threads whose stages sleep were scheduled, if any did.
    pub scheduling: Option<Scheduling>,
    /// Over what.
    pub provider: &'static str,
    /// What the attention stage takes.
    pub attention_us: f64,
    /// What the FFN stage takes.
    pub ffn_us: f64,
    /// What A2F and F2A take together, besides what the provider takes.
    pub wire_us: f64,
    /// Layers of the model.
    pub layers: u32,
    /// Microbatches in flight.
    pub microbatches: u16,
    /// How often it was run; the median counts.
    pub runs: usize,
    /// Time per output token.
    pub tpot_us: f64,
    /// Of each run.
    pub tpot_us_of_runs: Vec<f64>,
    /// What the stages allow.
    pub ideal_us: f64,
    /// What the model makes of the stages and of the overhead that was measured with each side busy by itself.
    pub predicted_us: f64,
    /// ideal / measured.
    pub efficiency: f64,
    /// What the machine makes of the stages; by the virtual clock there is none.
    pub floor: Option<Floor>,
    /// measured / floor.
    pub ratio: Option<f64>,
    /// What bounds a layer: `attention`, `ffn` or `wire`.
    pub bound: &'static str,
    /// Of the median run.
    pub stall_share: StallShare,
    /// Of the median run; by the virtual clock there is none.
    pub cores: Option<Cores>,
}

/// Runs a point so often.
pub(super) fn take(
    options: &Options,
    world: &mut World,
    stages: &Stages,
    overhead: Overhead,
) -> Result<Row, BenchError> {
    let (mut runs, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..options.runs.max(1) {
        if options.clock == Clock::Wall {
            bare.push(world.aside(|| bare::token(options.cpus, options.scheduling, stages, options.tokens))?);
        }
        runs.push(world.run(stages, options.tokens)?);
    }
    bare.sort();
    let floor = bare.get(bare.len() / 2).map(|&token| Floor { name: "bare_threads", tpot_us: us(token) });
    let tpot_us_of_runs = runs.iter().map(|run| us(run.token)).collect();
    runs.sort_by_key(|run| run.token);
    let median = &runs[runs.len() / 2];
    let (tpot_us, ideal_us) = (us(median.token), us(stages.ideal()));
    let ([attention, ffn], cores) = (median.stalled, median.cores);
    Ok(Row {
        clock: options.clock,
        sides: match (options.clock, &options.ffn) {
            (Clock::Virtual, _) => "turns",
            (Clock::Wall, Some(_)) => "processes",
            (Clock::Wall, None) => "threads",
        },
        scheduling: options.scheduling_of(stages),
        provider: options.provider.name(),
        attention_us: us(stages.attention),
        ffn_us: us(stages.ffn),
        wire_us: us(stages.wire),
        layers: stages.layers,
        microbatches: stages.microbatches,
        runs: runs.len(),
        tpot_us,
        tpot_us_of_runs,
        ideal_us,
        predicted_us: us(stages.predict(overhead)),
        efficiency: ideal_us / tpot_us,
        ratio: floor.as_ref().map(|floor| tpot_us / floor.tpot_us),
        floor,
        bound: match stages.bound() {
            Bound::Attention => "attention",
            Bound::Ffn => "ffn",
            Bound::Wire => "wire",
        },
        stall_share: StallShare { attention, ffn },
        cores: (options.clock == Clock::Wall).then_some(Cores { attention: cores[0], ffn: cores[1] }),
    })
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

impl Row {
    /// The head of the table that rows are lines of.
    pub const HEAD: &'static str = "M  attention µs    FFN µs   wire µs    TPOT µs   ideal µs  predicted  efficiency  \
                                    bare threads  ratio  \
                                    stalled: attention    FFN  cores: attention   FFN  bound";
}

/// A line of the table.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { microbatches, attention_us, ffn_us, wire_us, tpot_us, ideal_us, predicted_us, .. } = self;
        write!(
            f,
            "{microbatches}  {attention_us:>12.0} {ffn_us:>9.0} {wire_us:>9.0} {tpot_us:>10.0} {ideal_us:>10.0} \
             {predicted_us:>10.0}  {:>10.4}  {}  {:>16.1} % {:>4.1} %  {}  {}",
            self.efficiency,
            match (&self.floor, self.ratio) {
                (Some(floor), Some(ratio)) => format!("{:>12.0} {ratio:>6.3}", floor.tpot_us),
                _ => format!("{:>12} {:>6}", "-", "-"),
            },
            self.stall_share.attention * 100.0,
            self.stall_share.ffn * 100.0,
            match self.cores {
                Some(Cores { attention, ffn }) => format!("{attention:>16.2} {ffn:>5.2}"),
                None => format!("{:>16} {:>5}", "-", "-"),
            },
            self.bound
        )
    }
}
