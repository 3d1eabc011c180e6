//! Damaged block-FP8 checkpoints are refused by an error that names the tensor and what is wrong with it.
#![allow(clippy::unwrap_used)]

mod common;

use common::files::{FileDtype, Tensors, assert_says, read, save};
use common::{checkpoint, fp8_fixture};
use serde_json::{Value, json};
use stepmesh_model::{Checkpoint, CpuAttention, CpuFfn, Dtype, ModelConfig, ModelError, Shard};

/// Loads the FP8 fixture after `change`, whole.
fn load(change: impl FnOnce(&mut Tensors)) -> Result<(CpuAttention, CpuFfn), ModelError> {
    let mut tensors = read(&fp8_fixture("model.safetensors"));
    change(&mut tensors);
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fp8_fixture("config.json"), dir.path().join("config.json")).unwrap();
    save(&dir.path().join("model.safetensors"), &tensors);
    let checkpoint = Checkpoint::open(dir.path())?;
    Ok((CpuAttention::load(&checkpoint, Dtype::Fp8)?, CpuFfn::load(&checkpoint, Dtype::Fp8, Shard::WHOLE)?))
}

/// A matrix of the attention side, one of a dense layer, and stacked ones of experts.
const MATRICES: [&str; 3] =
    ["model.layers.2.self_attn.wq.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.moe.up_proj.weight"];

#[test]
fn an_unchanged_copy_loads() {
    load(|_| {}).unwrap();
}

#[test]
fn scales_that_are_missing_or_misshapen() {
    for name in MATRICES {
        let scales = format!("{name}_scale_inv");
        assert_says(load(|t| drop(t.remove(&scales))), &[name, "model.safetensors", &scales, "are missing"]);

        let shape = read(&fp8_fixture("model.safetensors"))[&scales].1.clone();
        let mut turned = shape.clone();
        turned.reverse();
        turned.push(1);
        let turn = |t: &mut Tensors| t.get_mut(&scales).unwrap().1 = turned.clone();
        assert_says(load(turn), &[&scales, &format!("{turned:?}"), &format!("{shape:?}")]);
        let narrow = |t: &mut Tensors| t.get_mut(&scales).unwrap().0 = FileDtype::I32;
        assert_says(load(narrow), &[&scales, "I32"]);
    }
}

#[test]
fn scales_that_make_no_sense() {
    for name in MATRICES {
        let scales = format!("{name}_scale_inv");
        for (value, word) in [(-1.0f32, "-1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let damage = |t: &mut Tensors| t.get_mut(&scales).unwrap().2[..4].copy_from_slice(&value.to_le_bytes());
            assert_says(load(damage), &[&scales, "model.safetensors", word]);
        }
    }
}

#[test]
fn weights_that_are_nan() {
    for name in MATRICES {
        for code in [0x7f, 0xff] {
            let damage = |t: &mut Tensors| t.get_mut(name).unwrap().2[10] = code;
            assert_says(load(damage), &[name, "model.safetensors", "NaN", "element 10"]);
        }
    }
}

#[test]
fn tensors_that_cannot_be_fp8() {
    for name in ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.post_attention_layernorm.weight"] {
        let shrink = |t: &mut Tensors| {
            let tensor = t.get_mut(name).unwrap();
            tensor.0 = FileDtype::F8_E4M3;
            tensor.2.truncate(tensor.2.len() / 2);
        };
        assert_says(load(shrink), &[name, "F8_E4M3", "only linear layers"]);
    }
}

#[test]
fn ways_of_quantising_that_are_not_known() {
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string(fp8_fixture("config.json")).unwrap()).unwrap();
    for (field, value) in [
        ("quant_method", json!("gptq")),
        ("fmt", json!("e5m2")),
        ("activation_scheme", json!("static")),
        ("weight_block_size", json!([64, 128])),
        ("weight_block_size", Value::Null),
    ] {
        let known = config["quantization_config"].clone();
        config["quantization_config"][field] = value.clone();
        let said = value.as_str().unwrap_or(field);
        let full = format!("quantization_config.{field}");
        assert_says(ModelConfig::from_json(&config.to_string(), "config.json"), &["config.json", &full, said]);
        config["quantization_config"] = known;
    }
}

#[test]
fn fp8_arithmetic_for_weights_that_are_not_fp8() {
    let words = ["needs FP8 weights", "bf16"];
    for dtype in [Dtype::Fp8, Dtype::Fp8F32] {
        assert_says(CpuAttention::load(&checkpoint(), dtype), &words);
        assert_says(CpuFfn::load(&checkpoint(), dtype, Shard::WHOLE), &words);
    }
}
