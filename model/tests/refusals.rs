//! Bad checkpoints are refused by an error that names the file and the tensor or field.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::files::{FileDtype, Tensors, assert_says, read, save};
use common::fixture;
use serde_json::{Value, json};
use stepmesh_model::{Checkpoint, CpuAttention, CpuFfn, Dtype, ModelConfig, ModelError, Shard};
use tempfile::TempDir;

fn config_json() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture("config.json")).unwrap()).unwrap()
}

fn tensors() -> Tensors {
    read(&fixture("model.safetensors"))
}

/// A directory with the tiny model's configuration and these tensors.
fn checkpoint_dir(tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("config.json"), dir.path().join("config.json")).unwrap();
    save(&dir.path().join("model.safetensors"), tensors);
    dir
}

fn load(dir: &Path) -> Result<(CpuAttention, CpuFfn), ModelError> {
    let checkpoint = Checkpoint::open(dir)?;
    Ok((CpuAttention::load(&checkpoint, Dtype::F32)?, CpuFfn::load(&checkpoint, Dtype::F32, Shard::WHOLE)?))
}

/// Loading after `change` fails with an error that says all of `words`.
#[track_caller]
fn assert_tensor_refused(change: impl FnOnce(&mut Tensors), words: &[&str]) {
    let mut tensors = tensors();
    change(&mut tensors);
    let dir = checkpoint_dir(&tensors);
    assert_says(load(dir.path()).map(|_| ()), words);
}

/// The configuration after `change` is refused with an error that says all of `words`.
#[track_caller]
fn assert_config_refused(change: Value, words: &[&str]) {
    let mut config = config_json();
    for (field, value) in change.as_object().unwrap() {
        match value {
            Value::String(text) if text == "(absent)" => config.as_object_mut().unwrap().remove(field),
            value => config.as_object_mut().unwrap().insert(field.clone(), value.clone()),
        };
    }
    let mut words = words.to_vec();
    words.push("config.json");
    assert_says(ModelConfig::from_json(&config.to_string(), "config.json"), &words);
}

#[test]
fn an_unchanged_copy_loads() {
    load(checkpoint_dir(&tensors()).path()).unwrap();
}

#[test]
fn tensors_that_are_missing_misshapen_or_of_another_type() {
    let lost = "model.layers.2.self_attn.wq.weight";
    assert_tensor_refused(|t| drop(t.remove(lost)), &[lost, "is missing"]);
    let lost = "model.layers.1.moe.down_proj.weight";
    assert_tensor_refused(|t| drop(t.remove(lost)), &[lost, "is missing"]);

    let bent = "model.layers.3.mlp.up_proj.weight";
    let swap = |t: &mut Tensors| t.get_mut(bent).unwrap().1 = vec![256, 512];
    assert_tensor_refused(swap, &[bent, "model.safetensors", "[256, 512]", "[512, 256]"]);

    let other = "lm_head.weight";
    assert_tensor_refused(|t| t.get_mut(other).unwrap().0 = FileDtype::I16, &[other, "model.safetensors", "I16"]);
    let fp8 = |t: &mut Tensors| {
        let tensor = t.get_mut(other).unwrap();
        tensor.0 = FileDtype::F8_E4M3;
        tensor.2.truncate(512 * 256);
    };
    assert_tensor_refused(fp8, &[other, "is FP8", "lm_head.weight_scale_inv", "missing"]);
}

#[test]
fn weights_that_are_not_finite() {
    for (bits, word) in [(0x7fc0u16, "NaN"), (0x7f80, "inf"), (0xff80, "-inf")] {
        for name in ["model.norm.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.1.moe.up_proj.weight"] {
            let damage = |t: &mut Tensors| t.get_mut(name).unwrap().2[20..22].copy_from_slice(&bits.to_le_bytes());
            assert_tensor_refused(damage, &[name, "model.safetensors", word, "element 10"]);
        }
    }
}

#[test]
fn f16_and_f32_weights_load_as_the_same_values() {
    let widen = |convert: fn(f32) -> Vec<u8>, dtype| {
        let mut all = tensors();
        for tensor in all.values_mut() {
            let words = tensor.2.as_chunks::<2>().0.iter();
            tensor.2 = words.flat_map(|word| convert(half::bf16::from_le_bytes(*word).to_f32())).collect();
            tensor.0 = dtype;
        }
        load(checkpoint_dir(&all).path()).unwrap()
    };
    widen(|value| value.to_le_bytes().to_vec(), FileDtype::F32);
    widen(|value| half::f16::from_f32(value).to_le_bytes().to_vec(), FileDtype::F16);
}

#[test]
fn files_that_are_absent_truncated_or_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    assert_says(Checkpoint::open(dir.path()), &["config.json", "cannot read"]);
    std::fs::copy(fixture("config.json"), dir.path().join("config.json")).unwrap();
    assert_says(Checkpoint::open(dir.path()), &["model.safetensors", "cannot read"]);

    let whole = std::fs::read(fixture("model.safetensors")).unwrap();
    let file = dir.path().join("model.safetensors");
    let cases: [(&[u8], &str); 5] = [
        (&[], "truncated"),
        (&whole[..7], "truncated"),
        (&whole[..1000], "truncated"),
        (&whole[..whole.len() - 1], "its length is not what its header declares"),
        (b"\x08\0\0\0\0\0\0\0not json", "model.safetensors"),
    ];
    for (bytes, word) in cases {
        std::fs::write(&file, bytes).unwrap();
        assert_says(Checkpoint::open(dir.path()), &["model.safetensors", "not a usable safetensors file", word]);
    }

    let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    let mut overlapping = (header.len() as u64).to_le_bytes().to_vec();
    overlapping.extend(header);
    overlapping.extend([0; 12]);
    std::fs::write(&file, &overlapping).unwrap();
    assert_says(Checkpoint::open(dir.path()), &["model.safetensors", "tensor `b` overlaps"]);

    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert_says(Checkpoint::open(dir.path()), &["config.json", "is not valid JSON"]);
}

/// Splits the tiny model into two shards with an index; returns the directory and the index's map.
fn sharded() -> (TempDir, serde_json::Map<String, Value>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("config.json"), dir.path().join("config.json")).unwrap();
    let mut first = tensors();
    let second = first.split_off("model.layers.2");
    let mut map = serde_json::Map::new();
    for (file, tensors) in [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)] {
        save(&dir.path().join(file), &tensors);
        map.extend(tensors.keys().map(|name| (name.clone(), json!(file))));
    }
    write_index(dir.path(), &json!({ "weight_map": map }));
    (dir, map)
}

fn write_index(dir: &Path, index: &Value) {
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn a_sharded_checkpoint_loads() {
    let (dir, _) = sharded();
    load(dir.path()).unwrap();
}

#[test]
fn an_index_that_contradicts_its_files() {
    let index = "model.safetensors.index.json";
    let (dir, map) = sharded();
    let name = "model.norm.weight";
    let with = |file: &str| {
        let mut map = map.clone();
        map.insert(name.into(), json!(file));
        write_index(dir.path(), &json!({ "weight_map": map }));
        Checkpoint::open(dir.path())
    };
    assert_says(with("model-00003.safetensors"), &[index, "model-00003.safetensors", "not there"]);
    assert_says(with("model-00001-of-00002.safetensors"), &[index, name, "model-00001", "does not hold it"]);
    assert_says(with("../outside.safetensors"), &[index, name, "not a plain file name"]);

    let mut short = map.clone();
    short.remove(name);
    write_index(dir.path(), &json!({ "weight_map": short }));
    assert_says(load(dir.path()).map(|_| ()), &[name, "is missing"]);
    write_index(dir.path(), &json!({}));
    assert_says(Checkpoint::open(dir.path()), &[index, "weight_map"]);
    write_index(dir.path(), &json!({ "weight_map": { "a": 3 } }));
    assert_says(Checkpoint::open(dir.path()), &[index, "tensor `a`"]);
}

#[test]
fn a_shard_reads_only_what_it_holds() {
    // Damage one expert: only the instance that holds it notices.
    let name = "model.layers.1.moe.gate_proj.weight";
    let mut tensors = tensors();
    tensors.get_mut(name).unwrap().2[7 * 128 * 256 * 2..][..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    let dir = checkpoint_dir(&tensors);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    CpuAttention::load(&checkpoint, Dtype::Bf16).unwrap();
    for index in 0..2 {
        CpuFfn::load(&checkpoint, Dtype::Bf16, Shard::new(index, 3).unwrap()).unwrap();
    }
    assert_says(CpuFfn::load(&checkpoint, Dtype::Bf16, Shard::new(2, 3).unwrap()), &[name, "NaN"]);
}

#[test]
fn a_checkpoint_in_the_binary() {
    static WEIGHTS: &[u8] = include_bytes!("../../fixtures/step3-tiny/model.safetensors");
    let config = config_json().to_string();
    let checkpoint = Checkpoint::from_bytes(&config, WEIGHTS).unwrap();
    CpuAttention::load(&checkpoint, Dtype::Bf16).unwrap();
    assert_says(Checkpoint::from_bytes(&config, &WEIGHTS[..99]), &["embedded model.safetensors", "truncated"]);
    assert_says(Checkpoint::from_bytes("[]", WEIGHTS), &["embedded config.json", "must be a JSON object"]);
}

#[test]
fn configurations_that_cannot_be_honoured() {
    for field in
        ["hidden_size", "num_hidden_layers", "head_dim", "vocab_size", "moe_top_k", "rms_norm_eps", "rope_theta"]
    {
        assert_config_refused(json!({ field: "(absent)" }), &[field, "is missing"]);
        assert_config_refused(json!({ field: "many" }), &[field, "\"many\"", "expected"]);
    }
    for field in ["hidden_size", "num_attention_heads", "share_q_dim", "intermediate_size", "share_expert_dim"] {
        for value in [json!(0), json!(-1), json!(1.5), json!(1u64 << 40)] {
            assert_config_refused(json!({ field: value }), &[field, &value.to_string()]);
        }
    }
    assert_config_refused(json!({"num_attention_groups": 8}), &["num_attention_groups", "is 8"]);
    assert_config_refused(json!({"head_dim": 63}), &["head_dim", "odd"]);
    assert_config_refused(json!({"moe_top_k": 9}), &["moe_top_k", "is 9, more than the 8 experts"]);
    assert_config_refused(json!({"model_type": "llama"}), &["model_type", "llama"]);
    assert_config_refused(json!({"hidden_act": "gelu"}), &["hidden_act", "gelu"]);
    assert_config_refused(json!({"rope_scaling": {"rope_type": "yarn"}}), &["rope_scaling.rope_type", "yarn"]);
    assert_config_refused(json!({"rope_scaling": {"type": "linear"}}), &["rope_scaling.type", "linear"]);
    assert_config_refused(
        json!({"rope_parameters": {"rope_type": "llama3"}}),
        &["rope_parameters.rope_type", "llama3"],
    );
    assert_config_refused(json!({"rope_theta": 0}), &["rope_theta", "above 1"]);
    assert_config_refused(json!({"rms_norm_eps": 0}), &["rms_norm_eps", "above zero"]);
    assert_config_refused(json!({"moe_layers_enum": "1,9"}), &["moe_layers_enum", "layer 9"]);
    assert_config_refused(json!({"moe_layers_enum": "1,x"}), &["moe_layers_enum", "1,x"]);
    assert_config_refused(json!({"eos_token_id": [1, 512]}), &["eos_token_id", "below 512"]);
    assert_config_refused(json!({"norm_expert_weight": 1}), &["norm_expert_weight", "true or false"]);
    let no_context = json!({"max_position_embedding": "(absent)", "max_seq_len": "(absent)"});
    assert_config_refused(no_context, &["max_position_embedding", "max_seq_len"]);
}

#[test]
fn every_spelling_of_a_configuration_reads_alike() {
    let plain = config_json();
    let config = |json: &Value| ModelConfig::from_json(&json.to_string(), "config.json").unwrap();
    let expected = config(&plain);
    assert_eq!((expected.context_length, expected.bos_token_id), (1024, Some(0)));
    assert_eq!(expected.eos_token_ids, [1]);
    assert_eq!((0..5).map(|layer| expected.is_moe(layer)).collect::<Vec<_>>(), [false, true, true, false, false]);

    assert_eq!(config(&json!({"model_type": "step3_vl", "text_config": plain, "vision_config": {}})), expected);
    let with = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut json = plain.clone();
        change(json.as_object_mut().unwrap());
        config(&json)
    };
    assert_eq!(with(&|c| drop(c.insert("moe_layers_enum".into(), json!([1, 2])))), expected);
    assert_eq!(with(&|c| drop(c.insert("moe_layers_enum".into(), json!(" 1, 2 ")))), expected);
    let plural = with(&|c| {
        c.remove("max_position_embedding");
        c.insert("max_position_embeddings".into(), json!(77));
    });
    assert_eq!(plural.context_length, 77);
    let folded = with(&|c| {
        c.remove("rope_theta");
        c.insert("rope_parameters".into(), json!({"rope_type": "default", "rope_theta": 500000.0}));
    });
    assert_eq!(folded, expected);
    let absent = with(&|c| drop(c.remove("moe_layers_enum")));
    assert_eq!((0..4).map(|layer| absent.is_moe(layer)).collect::<Vec<_>>(), [false, true, true, true]);

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), plain.to_string()).unwrap();
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [1, 128]}"#).unwrap();
    assert_eq!(ModelConfig::from_dir(dir.path()).unwrap().eos_token_ids, [1, 128]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": "x"}"#).unwrap();
    assert_says(ModelConfig::from_dir(dir.path()), &["generation_config.json", "eos_token_id"]);
}
