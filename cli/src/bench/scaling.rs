//! `stepmesh bench scaling`: what a transfer costs as a deployment grows.

use super::common::{Common, Session};
use super::screen::Screen;
use crate::error::CliError;
use clap::ValueEnum;
use stepmesh_bench::pushpull::{ScalingOptions, ScalingRow, run_scaling as measure};
use stepmesh_transport::Provider;

/// What is measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ScalingArguments {
    /// Over a simulated network that takes no time, over shared memory, or over sockets
    #[arg(long, value_name = "PROVIDER", value_delimiter = ',', num_args = 1, default_value = "mem,shm")]
    provider: Vec<Networks>,
    /// Attention instances, and as many FFN instances
    #[arg(long, value_name = "N", value_delimiter = ',', num_args = 1, default_value = "1,2,4,8,16",
          value_parser = clap::value_parser!(u32).range(1..=64))]
    members: Vec<u32>,
    #[command(flatten)]
    common: Common,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Networks {
    Mem,
    Shm,
    Tcp,
}

impl From<Networks> for Provider {
    fn from(network: Networks) -> Self {
        match network {
            Networks::Mem => Self::Mem,
            Networks::Shm => Self::Shm,
            Networks::Tcp => Self::Tcp,
        }
    }
}

pub(crate) fn run(arguments: &ScalingArguments) -> Result<(), CliError> {
    let session = Session::open(&arguments.common)?;
    let options = ScalingOptions {
        providers: arguments.provider.iter().copied().map(Into::into).collect(),
        members: arguments.members.clone(),
        quick: arguments.common.quick,
    };
    let mut screen = Screen::new();
    let mut report = session.report();
    screen.line(&report.machine);
    screen.line(&ScalingRow::HEAD);
    let outcome = measure(&options, &mut report, &mut |progress| session.follow(&mut screen, progress));
    session.close(&report, outcome, screen.finish())
}
