//! The FFN side of `stepmesh bench pipeline`, which it starts as a process of its own.

use super::common::explain;
use crate::error::CliError;
use crate::settings::Transport;
use std::path::PathBuf;
use stepmesh_bench::pipeline::{FfnRole, serve};

/// What the process that measures tells it.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct PipelineFfnArguments {
    /// The memory that the two share
    board: PathBuf,
    /// The scheduler's URL
    scheduler: String,
    provider: Transport,
    layers: u32,
    microbatches: u16,
    cpu: usize,
}

pub(crate) fn run(arguments: &PipelineFfnArguments) -> Result<(), CliError> {
    let role = FfnRole {
        board: arguments.board.clone(),
        scheduler: arguments.scheduler.clone(),
        provider: arguments.provider.into(),
        layers: arguments.layers,
        microbatches: arguments.microbatches,
        cpu: arguments.cpu,
    };
    serve(&role).map_err(explain)
}
