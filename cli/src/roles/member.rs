//! `stepmesh attention` and `stepmesh ffn`.

use super::log::{Log, start};
use crate::deployment::{JOINED, READY};
use crate::error::CliError;
use crate::output::say;
use crate::settings::{AttentionSettings, FfnSettings};
use crate::signals;
use std::time::Duration;
use stepmesh_pipeline::{AttentionOptions, DaemonError, FfnOptions, Notice, Shutdown};

/// Runs an attention daemon until a signal, or until the scheduler says so.
pub(crate) fn run_attention(settings: &AttentionSettings, log: Log) -> Result<(), CliError> {
    start(log);
    let options = AttentionOptions {
        daemon: settings.daemon_options()?,
        kv_tokens: settings.kv_tokens.get(),
        queue: settings.queue,
    };
    let shutdown = stop_on_signal(settings.drain_timeout_ms)?;
    Ok(stepmesh_pipeline::run_attention(options, &shutdown, &mut tell)?)
}

/// Runs an FFN daemon until a signal, or until the scheduler says so.
pub(crate) fn run_ffn(settings: &FfnSettings, log: Log) -> Result<(), CliError> {
    start(log);
    let options = FfnOptions { daemon: settings.daemon_options()?, policy: settings.policy.into() };
    let shutdown = stop_on_signal(settings.drain_timeout_ms)?;
    Ok(stepmesh_pipeline::run_ffn(options, &shutdown, &mut tell)?)
}

fn stop_on_signal(drain_timeout_ms: u64) -> Result<Shutdown, CliError> {
    let shutdown = Shutdown::default();
    let asked = shutdown.clone();
    signals::on_interrupt(Duration::from_millis(drain_timeout_ms), move || asked.trigger())?;
    Ok(shutdown)
}

/// What others may wait for is a line on standard output; the rest is logged.
fn tell(notice: Notice) {
    match notice {
        // Nobody reading is no reason to stop.
        Notice::Joined { rank } => drop(say(&format!("{JOINED}rank {rank}"))),
        Notice::Ready { epoch } => drop(say(&format!("{READY}epoch {epoch}"))),
        Notice::Loading { done, total } => tracing::debug!("loading: {done} of {total} bytes"),
        Notice::PeerLost(what) => tracing::error!("lost {what}"),
        Notice::LinkDown(what) => tracing::warn!("link down: {what}"),
        Notice::Draining => tracing::info!("the scheduler shuts the deployment down"),
    }
}

impl From<DaemonError> for CliError {
    fn from(error: DaemonError) -> Self {
        match error {
            DaemonError::Control(error) => error.into(),
            error if error.is_usage() => Self::plain_input(error.to_string()),
            error => Self::failed(error.to_string()),
        }
    }
}
