//! What is seen while daemons start: who started, how much of the weights is loaded, how fast, and the time left.

use crate::deployment::Progress;
use crate::output::say;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

const WAITING: &str = "{spinner} {msg}";
const LOADING: &str =
    "{spinner} loading [{bar:30}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left {msg}";

pub(crate) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

pub(crate) fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}

/// Weights on their way into memory: a bar on a terminal, nothing elsewhere.
pub(crate) struct LoadingBar(ProgressBar);

impl LoadingBar {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        bar.set_style(style(WAITING));
        if on_terminal() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Self(bar)
    }

    /// So many of so many bytes are loaded.
    pub(crate) fn show(&self, done: u64, total: u64) {
        if self.0.length() != Some(total) {
            self.0.set_style(style(LOADING));
            self.0.set_length(total);
        }
        self.0.set_position(done);
    }

    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// A deployment coming up.
pub(crate) struct StartScreen {
    started: Instant,
    bar: LoadingBar,
    /// Whether processes are named on standard output.
    tells: bool,
}

impl StartScreen {
    /// Tells of every process on standard output.
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), bar: LoadingBar::new(), tells: true }
    }

    /// Leaves standard output to others.
    pub(crate) fn quiet() -> Self {
        Self { tells: false, ..Self::new() }
    }

    pub(crate) fn show(&mut self, progress: &Progress<'_>) {
        match progress {
            Progress::Started(label, id) => self.tell(&format!("{label:<12} pid {id}")),
            Progress::Joined(count, all) => self.bar.0.set_message(format!("{count} of {all} daemons have joined")),
            Progress::Loading { done, total } => self.bar.show(*done, *total),
        }
    }

    pub(crate) fn finish(&self, complete: bool) {
        self.bar.finish();
        if complete {
            self.tell(&format!("complete     after {:.2} s\n", self.started.elapsed().as_secs_f64()));
        }
    }

    fn tell(&self, line: &str) {
        if self.tells {
            // That nobody reads is noticed, and ends the run, at the first line that matters.
            let _ = self.bar.0.suspend(|| say(line));
        }
    }
}
