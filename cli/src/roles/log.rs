//! What a daemon logs, on standard error: `RUST_LOG` decides, else how it was started.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// How much is logged unless `RUST_LOG` says otherwise.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Log {
    /// What went wrong: for the children of a command, which shows it when it fails.
    Problems,
    /// Who comes and goes, too.
    Events,
    /// Everything of this workspace.
    Everything,
}

/// Starts logging. A reader that goes away ends nothing.
pub(super) fn start(log: Log) {
    let level = match log {
        Log::Problems => "warn",
        Log::Events => "info",
        Log::Everything => "debug,h2=info,hyper=info,tonic=info,tower=info",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .log_internal_errors(false);
    let _ = subscriber.try_init();
}
