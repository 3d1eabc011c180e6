//! `stepmesh bench`: the latency suite.

mod common;
mod pushpull;
mod screen;
mod sizes;
mod transport;

use crate::error::CliError;
use clap::Subcommand;

/// What can be measured.
#[derive(Subcommand, Debug)]
pub(crate) enum BenchCommand {
    /// Round trips and streams over one transport, next to the floor of this machine, and to UCX where it is installed
    #[command(after_help = "Examples:  stepmesh bench transport --provider shm --json shm.json\n\
                                  \x20          stepmesh bench transport --provider tcp --sizes 8,7KiB,1.75MiB --quick")]
    Transport(transport::TransportArguments),
    /// Whole round trips through the mesh with the transfers of the Step-3 paper, next to the floor of this machine
    #[command(after_help = "Examples:  stepmesh bench pushpull --json pushpull.json\n\
                                  \x20          stepmesh bench pushpull --provider tcp --batch 128 --microbatches 3 --ffn-us 250")]
    Pushpull(pushpull::PushPullArguments),
}

pub(crate) fn run(command: BenchCommand) -> Result<(), CliError> {
    match command {
        BenchCommand::Transport(arguments) => transport::run(&arguments),
        BenchCommand::Pushpull(arguments) => pushpull::run(&arguments),
    }
}
