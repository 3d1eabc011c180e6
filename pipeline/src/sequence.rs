//! A sequence being decoded, and how a step's rows are dealt out. Pure.

use crate::Notice;
use std::collections::VecDeque;
use stepmesh_model::{ModelConfig, ModelError, Sampler, SamplingOptions, SequenceId};
use stepmesh_proto::control::{self, GenerateRequest, failed::Kind, sequence_event::Body};

/// Stop tokens are looked through for every token.
const MOST_STOP_TOKENS: usize = 64;

/// What an executor has to say: events of sequences for the scheduler, notices for whoever started the daemon.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    pub(crate) events: VecDeque<(u64, Body)>,
    pub(crate) notices: VecDeque<Notice>,
}

impl Outbox {
    pub(crate) fn fail(&mut self, sequence: u64, kind: Kind, message: impl Into<String>) {
        let failed = control::Failed { kind: kind as i32, message: message.into() };
        self.events.push_back((sequence, Body::Failed(failed)));
    }
}

/// A request that was checked and waits for room.
#[derive(Debug)]
pub(crate) struct Admitted {
    /// The scheduler's number.
    pub(crate) number: u64,
    pub(crate) request: GenerateRequest,
    pub(crate) sampler: Sampler,
}

impl Admitted {
    /// Tokens that the sequence may come to have.
    pub(crate) fn length(&self) -> usize {
        self.request.prompt.len() + self.request.max_new_tokens as usize
    }
}

/// A sequence on its way through the microbatches.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// The scheduler's number.
    pub(crate) number: u64,
    /// Its place in the KV cache.
    pub(crate) cache: SequenceId,
    /// Prompt and what was generated.
    pub(crate) tokens: Vec<u32>,
    /// Tokens that have gone through all layers.
    pub(crate) done: usize,
    pub(crate) generated: u32,
    pub(crate) max_new_tokens: u32,
    pub(crate) ignore_eos: bool,
    pub(crate) logits: bool,
    pub(crate) sampler: Sampler,
    /// Tokens that end it, beside the model's own.
    pub(crate) stop_tokens: Vec<u32>,
    /// Whether the prompt's log probabilities were asked for.
    pub(crate) score_prompt: bool,
    pub(crate) cancelled: bool,
    /// When the previous token came, or the admission.
    pub(crate) last_ns: u64,
}

impl Sequence {
    pub(crate) fn new(request: Admitted, cache: SequenceId, now_ns: u64) -> Self {
        let Admitted { number, request, sampler } = request;
        Self {
            number,
            cache,
            tokens: request.prompt,
            done: 0,
            generated: 0,
            max_new_tokens: request.max_new_tokens,
            ignore_eos: request.ignore_eos,
            logits: request.logits,
            sampler,
            stop_tokens: request.stop_tokens,
            score_prompt: request.score_prompt,
            cancelled: false,
            last_ns: now_ns,
        }
    }

    /// Tokens that have not gone through the layers yet; never none while the sequence lives.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.done
    }
}

/// Refuses what can never be decoded, in words that name the value and its limit.
pub(crate) fn admit(
    number: u64,
    request: GenerateRequest,
    config: &ModelConfig,
    kv_tokens: usize,
) -> Result<Admitted, String> {
    check(&request, config, kv_tokens)?;
    let sampler = Sampler::new(sampling(&request)).map_err(|error: ModelError| error.to_string())?;
    Ok(Admitted { number, request, sampler })
}

fn sampling(request: &GenerateRequest) -> SamplingOptions {
    request.sampling.map_or_else(SamplingOptions::default, |asked| SamplingOptions {
        temperature: asked.temperature,
        top_k: asked.top_k,
        top_p: asked.top_p,
        seed: asked.seed,
    })
}

fn check(request: &GenerateRequest, config: &ModelConfig, kv_tokens: usize) -> Result<(), String> {
    if request.prompt.is_empty() {
        return Err("the prompt is empty".into());
    }
    if request.max_new_tokens == 0 && !request.score_prompt {
        return Err("max_new_tokens is 0: ask for one token at least".into());
    }
    if request.stop_tokens.len() > MOST_STOP_TOKENS {
        return Err(format!("{} stop tokens are more than {MOST_STOP_TOKENS}", request.stop_tokens.len()));
    }
    if let Some(token) = request.prompt.iter().find(|&&token| token as usize >= config.vocab_size) {
        return Err(format!("token {token} of the prompt is outside the vocabulary of {}", config.vocab_size));
    }
    let length = request.prompt.len().saturating_add(request.max_new_tokens as usize);
    let (limit, what) = if kv_tokens < config.context_length {
        (kv_tokens, "the KV cache's room")
    } else {
        (config.context_length, "the model's context")
    };
    if length > limit {
        return Err(format!(
            "{} prompt tokens and {} new ones are beyond {what} of {limit} tokens",
            request.prompt.len(),
            request.max_new_tokens
        ));
    }
    Ok(())
}

/// Rows of a step for each sequence: one each first, so that decoding goes on beside a long prompt, then what is left
/// of `max_rows` to the earliest sequences with more pending. Zero only when there are more sequences than rows.
pub(crate) fn deal(pending: impl Iterator<Item = usize>, max_rows: usize, rows: &mut Vec<usize>) {
    rows.clear();
    rows.extend(pending);
    let mut left = max_rows.saturating_sub(rows.len());
    let mut ones = max_rows;
    for pending in rows.iter_mut() {
        let first = ones.min(1).min(*pending);
        ones -= first;
        let more = (*pending - first).min(if first == 0 { 0 } else { left });
        left -= more;
        *pending = first + more;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dealt(pending: &[usize], max_rows: usize) -> Vec<usize> {
        let mut rows = Vec::new();
        deal(pending.iter().copied(), max_rows, &mut rows);
        rows
    }

    #[test]
    fn decoding_goes_on_beside_a_long_prompt() {
        assert_eq!(dealt(&[91, 1, 1], 32), [30, 1, 1]);
        assert_eq!(dealt(&[1, 91, 40], 32), [1, 30, 1]);
    }

    #[test]
    fn no_more_rows_than_pending_and_no_more_than_fit() {
        assert_eq!(dealt(&[5, 3], 32), [5, 3]);
        assert_eq!(dealt(&[1, 1, 1], 2), [1, 1, 0]);
        assert_eq!(dealt(&[], 2), [0_usize; 0]);
        assert_eq!(dealt(&[7], 1), [1]);
    }
}
