//! The end of a step: scores of the prompt, the next tokens, and the sequences that are over.

use super::AttentionExecutor;
use crate::DaemonError;
use crate::sequence::Sequence;
use stepmesh_model::log_probability;
use stepmesh_proto::control::{self, failed::Kind, sequence_event::Body};

impl AttentionExecutor {
    /// After the last layer: the next token of every sequence whose rows are all done.
    pub(super) fn finish_step(&mut self, index: usize) -> Result<(), DaemonError> {
        let microbatch = &mut self.microbatches[index];
        let (hidden, vocabulary) = (self.stage.config().hidden_size, self.stage.config().vocab_size);
        self.logits.resize(vocabulary, 0.0);
        let mut row = 0;
        for (sequence, &rows) in microbatch.sequences.iter_mut().zip(&microbatch.counts) {
            let states = &microbatch.x[row * hidden..(row + rows) * hidden];
            row += rows;
            let first = sequence.done;
            sequence.done += rows;
            if sequence.cancelled || rows == 0 {
                continue;
            }
            if sequence.score_prompt && sequence.generated == 0 {
                let following = sequence.tokens[first + 1..].iter().take(rows);
                let mut log_probabilities = Vec::with_capacity(rows);
                for (state, &token) in states.chunks_exact(hidden).zip(following) {
                    self.stage.logits(state, &mut self.logits)?;
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
            self.stage.logits(&states[(rows - 1) * hidden..], &mut self.logits)?;
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
        let eos = &self.stage.config().eos_token_ids;
        let (cache, outbox) = (&mut self.cache, &mut self.outbox);
        self.microbatches[index].sequences.retain(|sequence| {
            let reason = match () {
                () if sequence.cancelled => None,
                () if sequence.is_at_end(eos) => Some(control::finished::Reason::Eos),
                () if sequence.is_complete() => Some(control::finished::Reason::Length),
                () => return true,
            };
            let _ = cache.free(sequence.cache);
            if let Some(reason) = reason {
                let finished = control::Finished { reason: reason as i32, tokens: sequence.generated };
                outbox.events.push_back((sequence.number, Body::Finished(finished)));
            }
            false
        });
    }
}

impl Sequence {
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
