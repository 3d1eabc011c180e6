//! What is seen while a suite runs: each result as a line when it is there; on a terminal also how far it is.

use crate::error::CliError;
use crate::output::say;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Display;
use std::io::IsTerminal;

/// Lines on standard output, a bar on a terminal's standard error.
pub(crate) struct Screen {
    bar: ProgressBar,
    shown: Result<(), CliError>,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let target =
            if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar, shown: Ok(()) }
    }

    /// Step `number` of so many has begun, for the `attempt`th time.
    pub(crate) fn step(&self, number: usize, of: usize, attempt: usize) {
        let message = if attempt > 1 { format!("its floor drifted: attempt {attempt}") } else { String::new() };
        self.bar.set_length(of as u64);
        self.bar.set_position(number as u64);
        self.bar.set_message(message);
    }

    /// Prints a line; false when nobody reads any more.
    pub(crate) fn line(&mut self, line: &dyn Display) -> bool {
        if self.shown.is_ok() {
            self.shown = self.bar.suspend(|| say(&line.to_string()));
        }
        self.shown.is_ok()
    }

    /// Whether everything could be printed.
    pub(crate) fn finish(self) -> Result<(), CliError> {
        self.bar.finish_and_clear();
        self.shown
    }
}
