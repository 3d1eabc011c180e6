//! What a daemon logs, on standard error: `RUST_LOG` decides, else `--verbose`.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Starts logging. A reader that goes away ends nothing.
pub(super) fn start(verbose: bool) {
    let level = if verbose { "debug,h2=info,hyper=info,tonic=info,tower=info" } else { "info" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .log_internal_errors(false);
    let _ = subscriber.try_init();
}
