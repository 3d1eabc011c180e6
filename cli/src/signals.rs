//! SIGINT and SIGTERM: as a future for commands, as a call-back with a deadline for daemons.

use crate::error::CliError;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Waits for SIGINT or SIGTERM. Both are caught from its making on.
pub(crate) struct Interrupt {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupt {
    /// Needs a runtime around it.
    pub(crate) fn new() -> Result<Self, CliError> {
        let catch = |kind| signal(kind).map_err(CliError::system("catch signals"));
        Ok(Self { interrupt: catch(SignalKind::interrupt())?, terminate: catch(SignalKind::terminate())? })
    }

    /// Returns when one has arrived since the last call.
    pub(crate) async fn arrived(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Calls `ask` on the first signal, and ends the process when that did not end it within `grace`, or on a second one.
pub(crate) fn on_interrupt(grace: Duration, ask: impl FnOnce() + Send + 'static) -> Result<(), CliError> {
    let runtime = runtime()?;
    let mut interrupt = {
        let _inside = runtime.enter();
        Interrupt::new()?
    };
    let watch = move || {
        runtime.block_on(async {
            interrupt.arrived().await;
            ask();
            let _ = tokio::time::timeout(grace, interrupt.arrived()).await;
        });
        crate::output::complain("error: stopped before work in flight was finished");
        std::process::exit(1);
    };
    std::thread::Builder::new().name("signals".into()).spawn(watch).map_err(CliError::system("start a thread"))?;
    Ok(())
}

/// A runtime on the calling thread only: children belong to the thread that starts them.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::system("start the event loop"))
}
