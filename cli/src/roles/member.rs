//! `stepmesh attention` and `stepmesh ffn`.

use super::log::{Log, start};
use crate::deployment::{JOINED, LOADING, READY};
use crate::error::CliError;
use crate::loading::{LoadingBar, on_terminal};
use crate::output::say;
use crate::settings::{AttentionSettings, FfnSettings};
use crate::signals;
use std::time::{Duration, Instant};
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
    Ok(stepmesh_pipeline::run_attention(options, &shutdown, &mut teller())?)
}

/// Runs an FFN daemon until a signal, or until the scheduler says so.
pub(crate) fn run_ffn(settings: &FfnSettings, log: Log) -> Result<(), CliError> {
    start(log);
    let options = FfnOptions { daemon: settings.daemon_options()?, policy: settings.policy.into() };
    let shutdown = stop_on_signal(settings.drain_timeout_ms)?;
    Ok(stepmesh_pipeline::run_ffn(options, &shutdown, &mut teller())?)
}

fn stop_on_signal(drain_timeout_ms: u64) -> Result<Shutdown, CliError> {
    let shutdown = Shutdown::default();
    let asked = shutdown.clone();
    signals::on_interrupt(Duration::from_millis(drain_timeout_ms), move || asked.trigger())?;
    Ok(shutdown)
}

/// How often a line says how much is loaded.
const LOADING_LINE_EVERY: Duration = Duration::from_secs(1);

/// What others may wait for is a line on standard output; the rest is logged. Loading is a bar on a terminal.
fn teller() -> impl FnMut(Notice) {
    let (bar, mut said) = (LoadingBar::new(), None::<Instant>);
    move |notice| match notice {
        Notice::Loading { done, total } if on_terminal() => {
            bar.show(done, total);
            if done == total {
                bar.finish();
            }
        }
        Notice::Loading { done, total } => {
            if done == total || said.is_none_or(|said| said.elapsed() >= LOADING_LINE_EVERY) {
                said = Some(Instant::now());
                drop(say(&format!("{LOADING}{done} of {total} bytes")));
            }
        }
        // Nobody reading is no reason to stop.
        Notice::Joined { rank } => drop(say(&format!("{JOINED}rank {rank}"))),
        Notice::Ready { epoch } => drop(say(&format!("{READY}epoch {epoch}"))),
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
