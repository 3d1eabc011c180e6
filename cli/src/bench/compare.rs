//! `stepmesh bench compare`: the systems that are installed on this machine, in turn with ours.

use super::common::{Common, Session};
use super::screen::Screen;
use super::sizes::{Size, Ways};
use crate::error::CliError;
use crate::settings::Transport;
use std::path::PathBuf;
use stepmesh_bench::compare::{Line, Options, Peers, run as measure};

/// What is compared.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct CompareArguments {
    /// The transports
    #[arg(long, value_name = "PROVIDER", value_delimiter = ',', num_args = 1, default_value = "shm,tcp")]
    provider: Vec<Transport>,
    /// Bytes of messages that bounce, beside the transport [default: 8,7KiB,64KiB,896KiB]
    #[arg(long, value_name = "SIZES", value_delimiter = ',', num_args = 1)]
    sizes: Vec<Size>,
    /// Bytes of requests and replies, beside the mesh [default: 7168:14336,896KiB:1792KiB]
    #[arg(long, value_name = "A2F:F2A", value_delimiter = ',', num_args = 1)]
    bytes: Vec<Ways>,
    /// The interpreter that has the peers in Python: pyzmq, nixl, mooncake
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    #[command(flatten)]
    common: Common,
}

pub(crate) fn run(arguments: &CompareArguments) -> Result<(), CliError> {
    let session = Session::open(&arguments.common)?;
    let mut screen = Screen::new();
    let mut report = session.report();
    screen.line(&report.machine);
    let peers = Peers::find(&arguments.python);
    for absent in &peers.absent {
        screen.line(&format!("not here: {absent}"));
    }
    if peers.bouncers.is_empty() && peers.echoes.is_empty() {
        return Err(CliError::failed("none of the peers is installed; install one of those above"));
    }
    let mut options = Options::new(peers, session.cpus);
    options.quick = arguments.common.quick;
    options.providers = arguments.provider.iter().copied().map(Into::into).collect();
    if !arguments.sizes.is_empty() {
        options.sizes = arguments.sizes.iter().map(|size| size.0).collect();
    }
    if !arguments.bytes.is_empty() {
        options.echoes = arguments.bytes.iter().map(|ways| ways.0).collect();
    }
    screen.line(&Line::HEAD);
    let outcome = measure(&options, &mut report, &mut |progress| session.follow(&mut screen, progress));
    session.close(&report, outcome, screen.finish())
}
