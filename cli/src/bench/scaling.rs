//! `stepmesh bench scaling`: what a transfer costs as a deployment grows.

use super::common::{Common, Session, in_role};
use super::screen::Screen;
use crate::error::CliError;
use clap::ValueEnum;
use stepmesh_bench::pushpull::{Driver, ScalingOptions, ScalingRow, run_scaling as measure};
use stepmesh_transport::Provider;

/// What is measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ScalingArguments {
    /// Over a simulated network that takes no time, over shared memory, or over sockets
    #[arg(long, value_name = "PROVIDER", value_delimiter = ',', num_args = 1, default_value = "mem,shm")]
    provider: Vec<Networks>,
    /// One thread that calls all members in turn, or each member a process of its own
    #[arg(long, value_name = "DRIVER", value_delimiter = ',', num_args = 1, default_value = "thread,processes")]
    driver: Vec<Drivers>,
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

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Drivers {
    Thread,
    Processes,
}

pub(crate) fn run(arguments: &ScalingArguments) -> Result<(), CliError> {
    let ScalingArguments { provider, driver, members, common } = arguments;
    let series = driver.iter().flat_map(|&driver| provider.iter().map(move |&provider| (provider, driver)));
    let series: Vec<_> = series
        .filter(|series| *series != (Networks::Mem, Drivers::Processes))
        .map(|(provider, driver)| {
            let driver = if driver == Drivers::Thread { Driver::Thread } else { Driver::Processes };
            (provider.into(), driver)
        })
        .collect();
    if series.is_empty() {
        return Err(CliError::input(
            "the simulated network is within one process",
            "add another --provider, or --driver thread",
        ));
    }
    let session = Session::open(common)?;
    let options = ScalingOptions {
        series,
        members: members.clone(),
        quick: common.quick,
        ..ScalingOptions::new(in_role("scaling-member"))
    };
    let mut screen = Screen::new();
    let mut report = session.report();
    screen.line(&report.machine);
    screen.line(&ScalingRow::HEAD);
    let outcome = measure(&options, &mut report, &mut |progress| session.follow(&mut screen, progress));
    session.close(&report, outcome, screen.finish())
}
