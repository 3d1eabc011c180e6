//! Each side matches the reference's layer traces on its own: what the other side would have sent is taken from them.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Golden, Model, difference, fixture};
use half::bf16;
use safetensors::SafeTensors;
use stepmesh_model::{Dtype, FfnInput, Hidden, ModelConfig, Row};

/// The two traced steps of prompt 0: its prefill, and the first token after it.
fn steps(golden: &Golden) -> [(&'static str, usize, Vec<u32>); 2] {
    let prompt = &golden.prompts[0];
    [("prefill", 0, prompt.tokens.clone()), ("decode1", prompt.tokens.len(), vec![prompt.greedy[0]])]
}

/// The traced output of a layer's FFN side, in full.
fn ffn_out(golden: &Golden, config: &ModelConfig, layer: usize, trace: &str) -> Vec<f32> {
    if !config.is_moe(layer) {
        return golden.tensor(&format!("{trace}.mlp_out"));
    }
    let (moe, share) = (golden.tensor(&format!("{trace}.moe_out")), golden.tensor(&format!("{trace}.share_out")));
    moe.iter().zip(share).map(|(moe, share)| moe + share).collect()
}

/// The experts and weights `[rows, top_k]` that the traced hidden states call for, computed in f64 from the router's
/// weights. The reference traced the logits of the step's first row, which they must match.
fn choices(golden: &Golden, config: &ModelConfig, layer: usize, trace: &str) -> (Vec<u16>, Vec<f32>) {
    let bytes = std::fs::read(fixture("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    let gate = weights.tensor(&format!("model.layers.{layer}.moe.gate.weight")).unwrap();
    let gate: Vec<f64> = gate.data().as_chunks().0.iter().map(|word| bf16::from_le_bytes(*word).to_f64()).collect();
    let (mut ids, mut probabilities) = (Vec::new(), Vec::new());
    for (row, hidden) in golden.tensor(&format!("{trace}.ffn_in")).chunks(config.hidden_size).enumerate() {
        let dot = |gate: &[f64]| gate.iter().zip(hidden).map(|(w, x)| w * f64::from(*x)).sum::<f64>();
        let logits: Vec<f64> = gate.chunks(config.hidden_size).map(dot).collect();
        if row == 0 {
            let found: Vec<f32> = logits.iter().map(|logit| *logit as f32).collect();
            assert!(difference(&found, &golden.tensor(&format!("{trace}.router_logits"))).0 < 4e-6);
        }
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        let mut order: Vec<usize> = (0..config.num_experts).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        for expert in &order[..config.top_k] {
            ids.push(*expert as u16);
            probabilities.push((logits[*expert].exp() / sum) as f32);
        }
    }
    (ids, probabilities)
}

#[test]
fn the_attention_side_matches_when_the_reference_plays_the_ffn_side() {
    let golden = Golden::read("golden_f32");
    let mut model = Model::new(Dtype::F32, 1);
    let config = model.config();
    let sequence = model.cache.reserve(64).unwrap();
    for (step, first, tokens) in steps(&golden) {
        let rows: Vec<Row> = (0..tokens.len()).map(|i| Row { sequence, position: first + i }).collect();
        let mut x = vec![0.0; tokens.len() * config.hidden_size];
        let mut y = x.clone();
        model.attention.embed(&tokens, &mut x).unwrap();
        for layer in 0..config.num_layers {
            let trace = format!("trace.{step}.layer{layer}");
            let compare = |what: &str, found: &[f32]| {
                let (largest, _) = difference(found, &golden.tensor(&format!("{trace}.{what}")));
                assert!(largest < 4e-6, "{trace}.{what}: {largest:e}");
            };
            let before = x.clone();
            model.attention.attention(layer, &rows, &mut x, &mut model.cache, &mut y).unwrap();
            let attn_out: Vec<f32> = x.iter().zip(&before).map(|(after, before)| after - before).collect();
            compare("attn_out", &attn_out);
            compare("ffn_in", &y);

            if config.is_moe(layer) {
                let count = rows.len() * config.top_k;
                let (mut ids, mut weights) = (vec![0; count], vec![0.0; count]);
                model.attention.route(layer, &y, &mut ids, &mut weights).unwrap();
                let (experts, expected) = choices(&golden, &config, layer, &trace);
                assert_eq!(ids, experts);
                assert!(difference(&weights, &expected).0 < 1e-6);
            }
            model.attention.combine(&mut x, &[&ffn_out(&golden, &config, layer, &trace)]).unwrap();
            compare("layer_out", &x);
        }
    }
}

#[test]
fn the_ffn_side_matches_when_the_reference_plays_the_attention_side() {
    let golden = Golden::read("golden_f32");
    for shards in [1, 2, 3, 5] {
        let mut model = Model::new(Dtype::F32, shards);
        let config = model.config();
        for (step, ..) in steps(&golden) {
            for layer in 0..config.num_layers {
                let trace = format!("trace.{step}.layer{layer}");
                let hidden = golden.tensor(&format!("{trace}.ffn_in"));
                let expected = ffn_out(&golden, &config, layer, &trace);
                let (experts, weights) =
                    if config.is_moe(layer) { choices(&golden, &config, layer, &trace) } else { Default::default() };
                let input = FfnInput { hidden: Hidden::Plain(&hidden), experts: &experts, weights: &weights };
                let mut sum = vec![0.0; hidden.len()];
                for ffn in &mut model.ffns {
                    let mut part = sum.clone();
                    ffn.forward(layer, &[input], &mut part).unwrap();
                    sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
                let (largest, _) = difference(&sum, &expected);
                // A GPU adds in another order.
                let most = if common::gpu().is_some() { 4e-6 } else { 2e-6 };
                assert!(largest < most, "{shards} shards, {trace}: {largest:e}");
            }
        }
    }
}

#[test]
fn both_sides_round_to_bf16_where_the_reference_does() {
    let golden = Golden::read("golden_bf16");
    let mut model = Model::new(Dtype::Bf16, 1);
    let config = model.config();
    let sequence = model.cache.reserve(64).unwrap();
    for (step, first, tokens) in steps(&golden) {
        let rows: Vec<Row> = (0..tokens.len()).map(|i| Row { sequence, position: first + i }).collect();
        let mut x = vec![0.0; tokens.len() * config.hidden_size];
        let mut y = x.clone();
        model.attention.embed(&tokens, &mut x).unwrap();
        for layer in 0..config.num_layers {
            let trace = format!("trace.{step}.layer{layer}");
            // Only the order of additions is left to differ: now and then an element rounds to its neighbour.
            let compare = |what: &str, found: &[f32], expected: &[f32]| {
                let equal = found.iter().zip(expected).filter(|(found, expected)| found == expected).count();
                assert!(equal * 100 >= expected.len() * 98, "{trace}.{what}: {equal} of {} equal", expected.len());
            };
            model.attention.attention(layer, &rows, &mut x, &mut model.cache, &mut y).unwrap();
            compare("ffn_in", &y, &golden.tensor(&format!("{trace}.ffn_in")));

            let y = golden.tensor(&format!("{trace}.ffn_in"));
            let mut expected = ffn_out(&golden, &config, layer, &trace);
            expected.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
            compare("ffn_out", &model.ffn(layer, &y)[0], &expected);
            model.attention.combine(&mut x, &[&expected]).unwrap();
            compare("layer_out", &x, &golden.tensor(&format!("{trace}.layer_out")));
            x = golden.tensor(&format!("{trace}.layer_out"));
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn all_of_it_on_a_gpu() {
    if common::gpu().is_none() {
        stepmesh_fake_cuda::harness::run_on_a_gpu(&["--skip", "all_of_it_on_a_gpu"]);
    }
}
