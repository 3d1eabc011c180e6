//! `stepmesh bench gpu`: what the runtime costs a GPU, and what it takes on it.

use super::common::{Common, Session, explain, in_role};
use super::screen::Screen;
use crate::error::CliError;
use std::path::PathBuf;
use stepmesh_bench::gpu::{GpuOptions, GpuPart, GpuRole, play};

/// What is measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct GpuArguments {
    /// The GPU, as the driver counts those that are visible
    #[arg(long, value_name = "INDEX", default_value = "0")]
    gpu: u32,
    /// numbers, pushpull, replay, attention, ffn, zero-sm, stream-in-place or stream-staged; several with commas between them
    /// [default: all but the streams]
    #[arg(long, value_name = "PARTS", value_delimiter = ',')]
    part: Vec<GpuPart>,
    /// Measure with both sides in one process only
    #[arg(long)]
    one_process: bool,
    /// Two processes share the GPU by MPS, whose daemon runs: the results say so
    #[arg(long)]
    mps: bool,
    /// A checkpoint whose linear layers are FP8, which `numbers` decodes with
    #[arg(long, value_name = "DIR")]
    fp8_checkpoint: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

/// What the process that measures tells the other.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct GpuFfnArguments {
    /// The scheduler's URL
    scheduler: String,
    /// The GPU
    gpu: u32,
    /// Where payloads lie
    place: String,
    /// What it does
    task: String,
    /// Tokens
    batch: u32,
}

pub(crate) fn run(arguments: &GpuArguments) -> Result<(), CliError> {
    let session = Session::open(&arguments.common)?;
    let options = GpuOptions {
        gpu: arguments.gpu,
        parts: if arguments.part.is_empty() { GpuPart::ALL.to_vec() } else { arguments.part.clone() },
        second: (!arguments.one_process).then(|| in_role("gpu-ffn")),
        is_mps: arguments.mps,
        fp8_checkpoint: arguments.fp8_checkpoint.clone(),
        quick: arguments.common.quick,
    };
    let mut screen = Screen::new();
    let mut report = session.report();
    screen.line(&report.machine);
    let outcome = stepmesh_bench::gpu::run(&options, &mut report, &mut |result| {
        session.follow(&mut screen, stepmesh_bench::Progress::Done(result)).is_continue()
    });
    session.close(&report, outcome, screen.finish())
}

pub(crate) fn run_ffn(arguments: &GpuFfnArguments) -> Result<(), CliError> {
    let GpuFfnArguments { scheduler, gpu, place, task, batch } = arguments.clone();
    play(&GpuRole { scheduler, gpu, place, task, batch }).map_err(explain)
}
