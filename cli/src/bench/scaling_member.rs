//! A member of `stepmesh bench scaling`, which it starts as a process of its own.

use super::common::explain;
use crate::error::CliError;
use crate::settings::Transport;
use std::path::PathBuf;
use stepmesh_bench::pushpull::{MemberRole, play};

/// What the process that measures tells it.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ScalingMemberArguments {
    /// The memory that all members share
    board: PathBuf,
    /// The scheduler's URL
    scheduler: String,
    provider: Transport,
    /// The number of an attention instance; none is an FFN instance
    attention: Option<usize>,
}

pub(crate) fn run(arguments: &ScalingMemberArguments) -> Result<(), CliError> {
    let role = MemberRole {
        board: arguments.board.clone(),
        scheduler: arguments.scheduler.clone(),
        provider: arguments.provider.into(),
        attention: arguments.attention,
    };
    play(&role).map_err(explain)
}
