//! What is seen while a run goes on: growing lines on a terminal, whole lines in a pipe.

use crate::decode::Decoded;
use crate::error::CliError;
use crate::loading::{on_terminal, style};
use crate::output::say;
use crate::prompts::Prompt;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget};
use std::io::Write;
use stepmesh_model::{Detokenizer, Text};

/// Ids of a prompt that are shown.
const PROMPT_SHOWN: usize = 8;
/// Tokens that fit on a growing line of a terminal.
const TAIL_SHOWN: usize = 14;
/// Characters that fit on one.
const TEXT_SHOWN: usize = 90;

/// Sequences that grow: a single text is written as it comes; of several, a line each on a terminal, and all in full at
/// the end.
pub(crate) struct Screen<'a> {
    prompts: &'a [Prompt],
    text: Option<&'a Text>,
    lines: Vec<Line>,
    /// Whether the one sequence is written to standard output as it grows.
    streams: bool,
}

/// One sequence.
struct Line {
    bar: ProgressBar,
    stream: Detokenizer,
    written: String,
}

impl<'a> Screen<'a> {
    /// One line for each prompt. `text` of the model, if the prompts are text.
    pub(crate) fn new(prompts: &'a [Prompt], text: Option<&'a Text>) -> Self {
        let streams = prompts.len() == 1 && prompts[0].text.is_some();
        let all = MultiProgress::new();
        if !on_terminal() || streams {
            all.set_draw_target(ProgressDrawTarget::hidden());
        }
        let line = |(index, prompt): (usize, &Prompt)| {
            let bar = all.add(ProgressBar::new_spinner().with_style(style("{prefix} {msg}")));
            bar.set_prefix(opening(index, prompt));
            Line { bar, stream: Detokenizer::default(), written: String::new() }
        };
        let lines = prompts.iter().enumerate().map(line).collect();
        if let (true, Some(prompt)) = (streams, &prompts[0].text) {
            write(prompt);
        }
        Self { prompts, text, lines, streams }
    }

    /// Sequence `index` has these tokens now, of which the last is new.
    pub(crate) fn show(&mut self, index: usize, tokens: &[u32]) {
        let (Some(line), Some(prompt)) = (self.lines.get_mut(index), self.prompts.get(index)) else { return };
        if let (Some(text), Some(_), Some(token)) = (self.text, &prompt.text, tokens.last()) {
            let piece = line.stream.push(text, *token).unwrap_or_default();
            line.written.push_str(&piece);
            if self.streams {
                write(&piece);
            }
            line.bar.set_message(tail(&line.written).to_owned());
            return;
        }
        let from = tokens.len().saturating_sub(TAIL_SHOWN);
        let ellipsis = if from > 0 { "… " } else { "" };
        line.bar.set_message(format!("{ellipsis}{} ({})", spaced(&tokens[from..]), tokens.len()));
    }

    /// All sequences in full, on standard output.
    pub(crate) fn print(mut self, sequences: &[Decoded]) -> Result<(), CliError> {
        self.lines.iter().for_each(|line| line.bar.finish_and_clear());
        if let (true, Some(text), Some(line)) = (self.streams, self.text, self.lines.first_mut()) {
            return say(&line.stream.finish(text).unwrap_or_default());
        }
        self.prompts.iter().zip(sequences).enumerate().try_for_each(|(index, (prompt, sequence))| {
            match (&prompt.text, self.text) {
                (Some(prompt), Some(text)) => {
                    let continued = text.decode(&sequence.tokens).unwrap_or_default();
                    say(&format!("#{index} {prompt}{continued}"))
                }
                _ => say(&format!("{} {}", opening(index, prompt), spaced(&sequence.tokens))),
            }
        })
    }
}

impl Drop for Screen<'_> {
    fn drop(&mut self) {
        self.lines.iter().for_each(|line| line.bar.finish_and_clear());
    }
}

/// To standard output at once. That nobody reads is noticed at the next whole line.
fn write(piece: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
}

/// The end of a growing text, from a word's beginning, as far as it fits on a line.
fn tail(text: &str) -> &str {
    let from = text.char_indices().rev().nth(TEXT_SHOWN).map_or(0, |(at, _)| at);
    let word = text[from..].find(' ').filter(|_| from > 0).map_or(from, |space| from + space);
    text[word..].trim_start()
}

fn opening(index: usize, prompt: &Prompt) -> String {
    if prompt.text.is_some() {
        return format!("#{index}");
    }
    let shown = &prompt.tokens[..prompt.tokens.len().min(PROMPT_SHOWN)];
    let more = prompt.tokens.len() - shown.len();
    let rest = if more > 0 { format!(" … {more} more") } else { String::new() };
    format!("#{index} [{}{rest}] →", spaced(shown))
}

fn spaced(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_growing_texts_end_begins_with_a_whole_word() {
        assert_eq!(tail("one two"), "one two");
        let long = "eleven chars ".repeat(20);
        let shown = tail(long.trim_end());
        assert!(shown.len() <= TEXT_SHOWN && (shown.starts_with("eleven") || shown.starts_with("chars")), "{shown}");
        assert_eq!(tail(&"ü".repeat(200)).chars().count(), TEXT_SHOWN + 1);
    }
}
