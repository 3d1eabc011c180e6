//! `stepmesh bench transport`: one provider against the floor of the machine and against UCX.

use super::common::{Common, Session};
use super::screen::Screen;
use super::sizes::Size;
use crate::error::CliError;
use crate::settings::Transport;
use clap::ValueEnum;
use stepmesh_bench::compare::Ucx;
use stepmesh_bench::transport::{Options, Row, run as measure};

/// What is measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct TransportArguments {
    /// The transport
    #[arg(long)]
    provider: Transport,
    /// Bytes of the transfers; streams take those from 64 KiB on [default: 8,64,4KiB,7KiB,64KiB,896KiB,1.75MiB]
    #[arg(long, value_name = "SIZES", value_delimiter = ',', num_args = 1)]
    sizes: Vec<Size>,
    /// Other systems to take turns with
    #[arg(long, default_value = "auto")]
    peers: Peers,
    #[command(flatten)]
    common: Common,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Peers {
    /// Those that are installed
    Auto,
    /// None
    None,
}

pub(crate) fn run(arguments: &TransportArguments) -> Result<(), CliError> {
    let session = Session::open(&arguments.common)?;
    let mut options = Options::new(arguments.provider.into(), session.cpus);
    options.quick = arguments.common.quick;
    if !arguments.sizes.is_empty() {
        options.sizes = arguments.sizes.iter().map(|size| size.0).collect();
    }
    let mut screen = Screen::new();
    let mut report = session.report();
    screen.line(&report.machine);
    if arguments.peers == Peers::Auto && Ucx::speaks(options.provider) {
        options.ucx = Ucx::find();
        match &options.ucx {
            Some(ucx) => drop(report.machine.versions.insert("ucx".into(), ucx.version.clone())),
            None => drop(screen.line(&"UCX is not compared with: there is no ucx_perftest (Debian: ucx-utils)")),
        }
    }
    screen.line(&Row::HEAD);
    let outcome = measure(&options, &mut report, &mut |progress| session.follow(&mut screen, progress));
    session.close(&report, outcome, screen.finish())
}
