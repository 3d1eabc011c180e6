//! What the fuzz targets call: each is given what a file of a checkpoint could hold, panics if a promise is broken, and
//! says whether it was taken. No part of the API.

use crate::checkpoint::parse_index;
use crate::{Checkpoint, CpuAttention, CpuFfn, Dtype, ModelConfig, ModelError, Shard};

/// A model small enough to be loaded at every input.
const CONFIG: &str = r#"{"model_type": "step3_text", "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1,
    "num_attention_groups": 1, "num_hidden_layers": 2, "max_seq_len": 8, "vocab_size": 4, "rms_norm_eps": 1e-05,
    "moe_intermediate_size": 2, "moe_num_experts": 2, "moe_top_k": 1, "rope_theta": 10000.0, "share_expert_dim": 2,
    "share_q_dim": 2, "head_dim": 2, "moe_layers_enum": "1"}"#;

fn told<T>(result: Result<T, ModelError>) -> Option<T> {
    result.map_err(|error| assert!(!error.to_string().is_empty())).ok()
}

/// A `config.json`.
pub fn config(bytes: &[u8]) -> bool {
    let config = told(ModelConfig::from_json(&String::from_utf8_lossy(bytes), "fuzz"));
    config.is_some_and(|config| {
        assert!(config.top_k <= config.num_experts && config.head_dim.is_multiple_of(2));
        assert!(config.num_moe_layers() <= config.num_layers && !config.is_moe(config.num_layers));
        assert!(config.eos_token_ids.iter().all(|&token| (token as usize) < config.vocab_size));
        let shard = told(Shard::new(2, 3));
        assert!(shard.is_some_and(|shard| shard.experts(&config).end == config.num_experts));
        true
    })
}

/// A `model.safetensors.index.json`.
pub fn index(bytes: &[u8]) -> bool {
    told(parse_index(&String::from_utf8_lossy(bytes), "fuzz")).is_some()
}

/// A `model.safetensors`, whose tensors lie in it, and from which the two sides are loaded if it has theirs.
pub fn safetensors(bytes: &[u8]) -> bool {
    let Some(checkpoint) = told(Checkpoint::from_owned(CONFIG, bytes.to_vec())) else { return false };
    checkpoint.check_all();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        told(CpuAttention::load(&checkpoint, dtype));
        told(CpuFfn::load(&checkpoint, dtype, Shard::WHOLE));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz_inputs::check;
    use ::safetensors::tensor::{Dtype as Kind, TensorView, serialize};

    #[test]
    fn configurations_of_any_bytes() {
        let tiny = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/step3-tiny/config.json")).unwrap();
        let nested = format!(r#"{{"model_type": "step3_vl", "eos_token_id": [1, 2], "text_config": {CONFIG}}}"#);
        check("model_config", &[tiny, nested.into_bytes()], config);
    }

    #[test]
    fn indices_of_any_bytes() {
        let seed = br#"{"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        check("model_index", &[seed.to_vec()], index);
    }

    #[test]
    fn safetensors_of_any_bytes() {
        let table: Vec<u8> = (0..16).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let norm: Vec<u8> = (0..4).flat_map(|i| half::bf16::from_f32(i as f32).to_le_bytes()).collect();
        let tensors = [
            ("model.embed_tokens.weight", TensorView::new(Kind::F32, vec![4, 4], &table).unwrap()),
            ("model.layers.0.input_layernorm.weight", TensorView::new(Kind::BF16, vec![4], &norm).unwrap()),
        ];
        check("model_safetensors", &[serialize(tensors, None).unwrap()], safetensors);
    }
}
