//! `stepmesh bench pipeline`: the three-stage executors with synthetic stages against what their times allow.

use super::common::{Common, Session, in_role};
use super::screen::Screen;
use crate::error::CliError;
use crate::settings::Transport;
use clap::ValueEnum;
use std::time::Duration;
use stepmesh_bench::Scheduling;
use stepmesh_bench::pipeline::{LAYERS, Options, Row, STAGE, run as measure};
use stepmesh_pipeline::Stages;

/// What is measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct PipelineArguments {
    /// The transport
    #[arg(long, default_value = "shm")]
    provider: Transport,
    /// The machine's clock, or a virtual one over a simulated network, in which software takes no time
    #[arg(long, default_value = "wall")]
    clock: Clocks,
    /// What the attention stage of a layer takes, in microseconds; with any of these four one point is measured instead
    /// of the sweep [default: 272]
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    attention_us: Option<u64>,
    /// What the FFN stage takes [default: 272]
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    ffn_us: Option<u64>,
    /// What A2F and F2A take together, besides what the transport takes [default: 272]
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u64).range(..=100_000))]
    wire_us: Option<u64>,
    /// Microbatches in flight [default: 3]
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u16).range(1..=16))]
    microbatches: Option<u16>,
    /// How often each point is run; the median counts [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: Option<u16>,
    /// How the threads of the stages are scheduled. Real-time ones take their time whatever else their CPU has to do, as a
    /// GPU would; they take root or CAP_SYS_NICE [default: real-time where that is allowed]
    #[arg(long)]
    scheduling: Option<Schedulings>,
    /// The two sides as threads of this process instead of two processes
    #[arg(long)]
    threads: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Clocks {
    Wall,
    Virtual,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Schedulings {
    RealTime,
    Ordinary,
}

pub(crate) fn run(arguments: &PipelineArguments) -> Result<(), CliError> {
    let session = Session::open(&arguments.common)?;
    let mut options = Options::new(arguments.provider.into(), session.cpus);
    match arguments.clock {
        Clocks::Virtual => options.by_virtual_clock(),
        Clocks::Wall if arguments.threads => {}
        Clocks::Wall => options.ffn = Some(in_role("pipeline-ffn")),
    }
    if arguments.common.quick {
        options.quick();
    }
    if let Some(runs) = arguments.runs {
        options.runs = runs.into();
    }
    if let Some(scheduling) = arguments.scheduling {
        options.scheduling = match scheduling {
            Schedulings::RealTime => Scheduling::RealTime,
            Schedulings::Ordinary => Scheduling::Ordinary,
        };
    }
    let PipelineArguments { attention_us, ffn_us, wire_us, microbatches, .. } = *arguments;
    if attention_us.or(ffn_us).or(wire_us).is_some() || microbatches.is_some() {
        let time = |given: Option<u64>| given.map_or(STAGE, Duration::from_micros);
        options.points = vec![Stages {
            attention: time(attention_us),
            ffn: time(ffn_us),
            wire: time(wire_us),
            microbatches: microbatches.unwrap_or(3),
            layers: LAYERS,
        }];
    }
    let mut screen = Screen::new();
    let mut report = session.report();
    screen.line(&report.machine);
    screen.line(&format!(
        "1A1F over {}, {LAYERS} layers, synthetic stages{}, emulated wire",
        options.provider,
        match options.points.iter().find_map(|point| options.scheduling_of(point)) {
            None => "",
            Some(Scheduling::RealTime) => " on real-time threads",
            Some(Scheduling::Ordinary) => " on ordinary threads, which the kernel may make late",
        }
    ));
    screen.line(&Row::HEAD);
    let outcome = measure(&options, &mut report, &mut |progress| session.follow(&mut screen, progress));
    session.close(&report, outcome, screen.finish())
}
