//! What is seen while a run goes on: bars and growing lines on a terminal, whole lines in a pipe.

use crate::decode::Decoded;
use crate::deployment::Progress;
use crate::error::CliError;
use crate::output::say;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Ids of a prompt that are shown.
const PROMPT_SHOWN: usize = 8;
/// Tokens that fit on a growing line of a terminal.
const TAIL_SHOWN: usize = 14;

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}

/// The deployment coming up.
pub(crate) struct StartScreen {
    started: Instant,
    bar: ProgressBar,
}

impl StartScreen {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style("{spinner} {msg}"));
        if on_terminal() {
            bar.enable_steady_tick(Duration::from_millis(100));
        } else {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Self { started: Instant::now(), bar }
    }

    pub(crate) fn show(&mut self, progress: &Progress<'_>) {
        match progress {
            Progress::Started(label, id) => self.tell(&format!("{label:<12} pid {id}")),
            Progress::Joined(count, all) => self.bar.set_message(format!("{count} of {all} daemons have joined")),
        }
    }

    pub(crate) fn finish(&self, complete: bool) {
        self.bar.finish_and_clear();
        if complete {
            self.tell(&format!("complete     after {:.2} s\n", self.started.elapsed().as_secs_f64()));
        }
    }

    fn tell(&self, line: &str) {
        // That nobody reads is noticed, and ends the run, at the first line that matters.
        let _ = self.bar.suspend(|| say(line));
    }
}

/// Sequences that grow. On a terminal only; whole lines come from [`Screen::print`].
pub(crate) struct Screen {
    bars: Vec<ProgressBar>,
}

impl Screen {
    /// One line for each prompt.
    pub(crate) fn new(prompts: &[Vec<u32>]) -> Self {
        if !on_terminal() {
            return Self { bars: Vec::new() };
        }
        let all = MultiProgress::new();
        let line = |(index, prompt): (usize, &Vec<u32>)| {
            let bar = all.add(ProgressBar::new_spinner().with_style(style("{prefix} {msg}")));
            bar.set_prefix(opening(index, prompt));
            bar
        };
        Self { bars: prompts.iter().enumerate().map(line).collect() }
    }

    /// Sequence `index` has these tokens now.
    pub(crate) fn show(&mut self, index: usize, tokens: &[u32]) {
        if let Some(bar) = self.bars.get(index) {
            let from = tokens.len().saturating_sub(TAIL_SHOWN);
            let ellipsis = if from > 0 { "… " } else { "" };
            bar.set_message(format!("{ellipsis}{} ({})", spaced(&tokens[from..]), tokens.len()));
        }
    }

    /// All sequences in full, on standard output.
    pub(crate) fn print(prompts: &[Vec<u32>], sequences: &[Decoded]) -> Result<(), CliError> {
        prompts.iter().zip(sequences).enumerate().try_for_each(|(index, (prompt, sequence))| {
            say(&format!("{} {}", opening(index, prompt), spaced(&sequence.tokens)))
        })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.bars.iter().for_each(ProgressBar::finish_and_clear);
    }
}

fn opening(index: usize, prompt: &[u32]) -> String {
    let shown = &prompt[..prompt.len().min(PROMPT_SHOWN)];
    let more = prompt.len() - shown.len();
    let rest = if more > 0 { format!(" … {more} more") } else { String::new() };
    format!("#{index} [{}{rest}] →", spaced(shown))
}

fn spaced(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}
