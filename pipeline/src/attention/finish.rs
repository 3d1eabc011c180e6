//! The end of a step: scores of the prompt, the next tokens, and the sequences that are over.

use super::AttentionExecutor;
use crate::DaemonError;
use crate::microbatch::Phase;
use crate::sequence::Sequence;
use std::ops::Range;
use stepmesh_model::log_probability;
use stepmesh_proto::control::{self, failed::Kind, sequence_event::Body};

impl AttentionExecutor {
    /// Behind the last layer: begins what the next tokens, or scores of the prompt, follow from.
    pub(super) fn begin_finish(&mut self, index: usize) -> Result<(), DaemonError> {
        let microbatch = &mut self.microbatches[index];
        let (mut row, mut wanted) = (0, None);
        for (sequence, &rows) in microbatch.sequences.iter().zip(&microbatch.counts) {
            let (first, end) = (row, row + rows);
            row = end;
            let first = match () {
                () if sequence.cancelled || rows == 0 => continue,
                () if sequence.scores_prompt() => first,
                () if sequence.pending() == rows && sequence.max_new_tokens > 0 => end - 1,
                () => continue,
            };
            wanted = Some(wanted.map_or(first, |wanted: Range<usize>| wanted.start)..end);
        }
        self.compute.begin_logits(index, wanted.unwrap_or_default())?;
        microbatch.phase = Phase::Computing { layer: self.compute.config().num_layers };
        Ok(())
    }

    /// The next token of every sequence whose rows are all done.
    pub(super) fn finish_step(&mut self, index: usize) -> Result<(), DaemonError> {
        let microbatch = &mut self.microbatches[index];
        self.logits.resize(self.compute.config().vocab_size, 0.0);
        let mut row = 0;
        for (sequence, &rows) in microbatch.sequences.iter_mut().zip(&microbatch.counts) {
            let states = row..row + rows;
            row += rows;
            let first = sequence.done;
            sequence.done += rows;
            if sequence.cancelled || rows == 0 {
                continue;
            }
            if sequence.scores_prompt() {
                let following = sequence.tokens[first + 1..].iter().take(rows);
                let mut log_probabilities = Vec::with_capacity(rows);
                for (state, &token) in states.clone().zip(following) {
                    self.compute.logits(index, state, &mut self.logits)?;
                    match log_probability(&self.logits, token) {
                        Ok(score) => log_probabilities.push(score),
                        Err(error) => {
                            self.outbox.fail(sequence.number, Kind::Internal, error.to_string());
                            sequence.cancelled = true;
                            break;
                        }
                    }
                }
                if sequence.cancelled {
                    continue;
                }
                self.outbox.events.push_back((sequence.number, Body::Scores(control::Scores { log_probabilities })));
            }
            if sequence.pending() > 0 || sequence.max_new_tokens == 0 {
                continue;
            }
            self.compute.logits(index, states.end - 1, &mut self.logits)?;
            let token = match sequence.sampler.choose(&self.logits) {
                Ok(token) => token,
                Err(error) => {
                    self.outbox.fail(sequence.number, Kind::Internal, error.to_string());
                    sequence.cancelled = true;
                    continue;
                }
            };
            let now_ns = self.mesh.clock().now_ns();
            let elapsed_ns = now_ns.saturating_sub(sequence.last_ns);
            sequence.last_ns = now_ns;
            sequence.tokens.push(token);
            sequence.generated += 1;
            self.figures.tokens += 1;
            let logits = if sequence.logits {
                self.logits.iter().flat_map(|logit| logit.to_le_bytes()).collect()
            } else {
                Vec::new()
            };
            let attention_rank = self.mesh.rank().unwrap_or_default();
            let event = control::Token { token, elapsed_ns, logits, attention_rank, microbatch: index as u32 };
            self.outbox.events.push_back((sequence.number, Body::Token(event)));
        }
        self.end_sequences(index);
        Ok(())
    }

    /// Sequences that were cancelled, have come to an end token, or are as long as was asked for.
    fn end_sequences(&mut self, index: usize) {
        let (compute, outbox) = (&mut self.compute, &mut self.outbox);
        self.microbatches[index].sequences.retain(|sequence| {
            let reason = match () {
                () if sequence.cancelled => None,
                () if sequence.is_at_end(&compute.config().eos_token_ids) => Some(control::finished::Reason::Eos),
                () if sequence.is_complete() => Some(control::finished::Reason::Length),
                () => return true,
            };
            let _ = compute.cache().free(sequence.cache);
            if let Some(reason) = reason {
                let finished = control::Finished { reason: reason as i32, tokens: sequence.generated };
                outbox.events.push_back((sequence.number, Body::Finished(finished)));
            }
            false
        });
    }
}

impl Sequence {
    /// Whether its prompt's tokens are scored.
    fn scores_prompt(&self) -> bool {
        self.score_prompt && self.generated == 0
    }

    /// Whether the last token generated is one that ends the sequence.
    fn is_at_end(&self, eos: &[u32]) -> bool {
        let last = self.tokens.last().filter(|_| self.generated > 0);
        last.is_some_and(|last| self.stop_tokens.contains(last) || !self.ignore_eos && eos.contains(last))
    }

    /// Whether there is nothing left to do: all asked for is generated, or, of none asked for, the prompt is through.
    fn is_complete(&self) -> bool {
        self.generated == self.max_new_tokens && (self.generated > 0 || self.pending() == 0)
    }
}
