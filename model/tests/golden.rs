//! The whole model gives what the reference implementation gives.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Golden, Model, difference};
use stepmesh_model::{Dtype, greedy};

/// All prompts: 32 greedy tokens and all their logits.
fn assert_f32_matches(shards: usize, chunk: usize) {
    let golden = Golden::read("golden_f32");
    let mut model = Model::new(Dtype::F32, shards);
    let vocab = model.config().vocab_size;
    for (number, prompt) in golden.prompts.iter().enumerate() {
        let expected = golden.tensor(&format!("logits.{number}"));
        let sequence = model.cache.reserve(prompt.tokens.len() + prompt.greedy.len()).unwrap();
        let mut logits = model.feed(sequence, 0, &prompt.tokens, chunk);
        for (step, token) in prompt.greedy.iter().enumerate() {
            let (largest, _) = difference(&logits, &expected[step * vocab..][..vocab]);
            assert!(largest < 2e-5, "{shards} shards, chunk {chunk}, prompt {number}, step {step}: {largest:e}");
            assert_eq!(greedy(&logits).unwrap(), *token, "prompt {number}, step {step}");
            logits = model.feed(sequence, prompt.tokens.len() + step, &[*token], 1);
        }
        model.cache.free(sequence).unwrap();
    }
}

#[test]
fn one_ffn_instance_and_whole_prompts() {
    assert_f32_matches(1, usize::MAX >> 1);
}

#[test]
fn two_ffn_instances_and_prompts_in_chunks_of_7() {
    assert_f32_matches(2, 7);
}

#[test]
fn three_ffn_instances_and_prompts_token_by_token() {
    assert_f32_matches(3, 1);
}

#[test]
fn more_ffn_instances_than_experts() {
    assert_f32_matches(11, 16);
}

#[test]
fn bf16_stays_within_the_noise_of_the_reference_when_both_see_the_same_tokens() {
    let golden = Golden::read("golden_bf16");
    for shards in [1, 3] {
        let mut model = Model::new(Dtype::Bf16, shards);
        let vocab = model.config().vocab_size;
        for (number, prompt) in golden.prompts.iter().enumerate() {
            let expected = golden.tensor(&format!("logits.{number}"));
            let sequence = model.cache.reserve(prompt.tokens.len() + prompt.greedy.len()).unwrap();
            let mut all = model.feed(sequence, 0, &prompt.tokens, 16);
            for (i, token) in prompt.greedy[..31].iter().enumerate() {
                all.extend(model.feed(sequence, prompt.tokens.len() + i, &[*token], 1));
            }
            assert_eq!(all.len(), 32 * vocab);
            let (largest, mean) = difference(&all, &expected);
            assert!(largest <= 0.09 && mean <= 0.015, "prompt {number}: largest {largest}, mean {mean}");
        }
    }
}
