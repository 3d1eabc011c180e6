//! `stepmesh bench pushpull`: whole round trips through the mesh against the floor of the machine.

use super::common::{Common, Session};
use super::screen::Screen;
use super::sizes::Ways;
use crate::error::CliError;
use crate::settings::Transport;
use clap::ValueEnum;
use std::num::{NonZeroU16, NonZeroU32};
use std::time::Duration;
use stepmesh_bench::pushpull::{Engine, Options, Row, run as measure};
use stepmesh_bench::transport::Mode;

/// What is measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct PushPullArguments {
    /// The transport
    #[arg(long, default_value = "shm")]
    provider: Transport,
    /// Attention instances, all driven by one thread
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=64))]
    attention: u32,
    /// FFN instances, all driven by one thread
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=64))]
    ffn: u32,
    /// Tokens of a transfer [default: 1,8,32,128,256,512]
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', num_args = 1)]
    batch: Vec<NonZeroU32>,
    /// One tensor of so many bytes there and one back, instead of the paper's transfers
    #[arg(long, value_name = "A2F:F2A", value_delimiter = ',', num_args = 1)]
    bytes: Vec<Ways>,
    /// Where tensors are produced: in the slot that is sent, or elsewhere and copied into it
    #[arg(long, default_value = "both")]
    mode: Modes,
    /// Who drives the members: the thread that uses them, or a progress thread of each
    #[arg(long, default_value = "caller")]
    engine: Engines,
    /// Requests of each attention instance under way at once
    #[arg(long, value_name = "M", default_value = "1")]
    microbatches: NonZeroU16,
    /// How long an FFN instance computes, in microseconds
    #[arg(long, value_name = "US", default_value = "0", value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    ffn_us: u64,
    #[command(flatten)]
    common: Common,
}

/// More tokens than any deployment sends at once: their slots alone would fill the memory limit.
const MOST_TOKENS: u32 = 16_384;
/// More than any pipeline has.
const MOST_MICROBATCHES: u16 = 64;

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
#[value(rename_all = "snake_case")]
enum Modes {
    Both,
    Copy,
    InPlace,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Engines {
    Both,
    Caller,
    Threaded,
}

pub(crate) fn run(arguments: &PushPullArguments) -> Result<(), CliError> {
    if let Some(batch) = arguments.batch.iter().find(|batch| batch.get() > MOST_TOKENS) {
        return Err(CliError::plain_input(format!("--batch {batch}: at most {MOST_TOKENS} tokens")));
    }
    if arguments.microbatches.get() > MOST_MICROBATCHES {
        let given = arguments.microbatches;
        return Err(CliError::plain_input(format!("--microbatches {given}: at most {MOST_MICROBATCHES}")));
    }
    let session = Session::open(&arguments.common)?;
    let mut options = Options::new(arguments.provider.into(), session.cpus);
    options.quick = arguments.common.quick;
    (options.attention, options.ffn) = (arguments.attention, arguments.ffn);
    options.microbatches = arguments.microbatches.get();
    options.ffn_time = Duration::from_micros(arguments.ffn_us);
    if !arguments.batch.is_empty() {
        options.batches = arguments.batch.iter().map(|batch| batch.get()).collect();
    }
    if !arguments.bytes.is_empty() {
        options.plain = arguments.bytes.iter().map(|ways| ways.0).collect();
        if arguments.batch.is_empty() {
            options.batches.clear();
        }
    }
    match arguments.mode {
        Modes::Both => {}
        Modes::Copy => options.modes = vec![Mode::Copy],
        Modes::InPlace => options.modes = vec![Mode::InPlace],
    }
    match arguments.engine {
        Engines::Both => options.engines = vec![Engine::Caller, Engine::Threaded],
        Engines::Caller => {}
        Engines::Threaded => options.engines = vec![Engine::Threaded],
    }
    let mut screen = Screen::new();
    let mut report = session.report();
    screen.line(&report.machine);
    screen.line(&format!(
        "{}A{}F over {}, broadcast, {} under way, FFN {} µs",
        options.attention, options.ffn, options.provider, options.microbatches, arguments.ffn_us
    ));
    screen.line(&Row::HEAD);
    let outcome = measure(&options, &mut report, &mut |progress| session.follow(&mut screen, progress));
    session.close(&report, outcome, screen.finish())
}
