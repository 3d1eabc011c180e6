//! The whole model gives what the reference implementation gives.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Golden, Model, difference, fp8_fixture};
use stepmesh_model::{Checkpoint, Dtype, greedy};

/// All prompts: 32 greedy tokens and all their logits.
fn assert_f32_matches(shards: usize, chunk: usize) {
    assert_matches(&Golden::read("golden_f32"), Model::new(Dtype::F32, shards), shards, chunk);
}

fn assert_matches(golden: &Golden, mut model: Model, shards: usize, chunk: usize) {
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
            assert!(mean <= 0.015, "prompt {number}: mean {mean}");
            // With several shards the partial sums are rounded once more each.
            let most = if shards == 1 { 0.09 } else { 0.18 };
            assert!(largest <= most, "{shards} shards, prompt {number}: largest {largest}");
        }
    }
}

fn fp8_checkpoint() -> Checkpoint {
    Checkpoint::open(&fp8_fixture("")).unwrap()
}

/// FFN instances, and among how many of them each expert is cut.
const SPLITS: [(usize, usize); 7] = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (3, 1), (3, 3)];

#[test]
fn dequantised_fp8_weights_give_the_reference_of_a_third_party_on_every_split() {
    let golden = Golden::read_from(fp8_fixture("golden_w8_dequant_f32"));
    for (shards, tensor) in SPLITS {
        assert_matches(&golden, Model::of(&fp8_checkpoint(), Dtype::F32, shards, tensor), shards, 16);
    }
}

#[test]
fn bf16_weights_give_the_reference_on_every_split() {
    let golden = Golden::read("golden_f32");
    for (shards, tensor) in SPLITS {
        assert_matches(&golden, Model::of(&common::checkpoint(), Dtype::F32, shards, tensor), shards, 16);
    }
}

/// Teacher-forced logits of all prompts, `[32, vocab]` each.
fn teacher_forced(model: &mut Model, golden: &Golden) -> Vec<Vec<f32>> {
    let forced = golden.prompts.iter().map(|prompt| {
        let sequence = model.cache.reserve(prompt.tokens.len() + prompt.greedy.len()).unwrap();
        let mut all = model.feed(sequence, 0, &prompt.tokens, 16);
        for (i, token) in prompt.greedy[..31].iter().enumerate() {
            all.extend(model.feed(sequence, prompt.tokens.len() + i, &[*token], 1));
        }
        model.cache.free(sequence).unwrap();
        all
    });
    forced.collect()
}

#[test]
fn w8a8() {
    let golden = Golden::read_from(fp8_fixture("golden_w8a8_f32acc"));
    for (dtype, shards, tensor, wire) in [
        (Dtype::Fp8F32, 1, 1, false),
        (Dtype::Fp8F32, 1, 1, true),
        (Dtype::Fp8F32, 2, 2, true),
        (Dtype::Fp8F32, 4, 2, true),
        (Dtype::Fp8F32, 3, 1, true),
        (Dtype::Fp8, 1, 1, false),
        (Dtype::F32, 1, 1, false),
        (Dtype::Bf16, 1, 1, false),
    ] {
        let mut model = Model::of(&fp8_checkpoint(), dtype, shards, tensor);
        model.fp8_wire = wire;
        for (number, found) in teacher_forced(&mut model, &golden).iter().enumerate() {
            let (largest, mean) = difference(found, &golden.tensor(&format!("logits.{number}")));
            println!("{dtype} {shards} {tensor} {wire} prompt {number}: largest {largest:e} mean {mean:e}");
        }
    }
}
