//! How large a model is, counted from its configuration alone.

use crate::fp8::FP8_GROUP;
use crate::{Dtype, ModelConfig, Shard};

/// Numbers of parameters. Activated means: multiplied with one token, so without the embedding, a table look-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCount {
    /// All parameters of the text model.
    pub total: u64,
    /// Parameters that one token is multiplied with, output head included, embedding excluded.
    pub activated: u64,
    /// Parameters that an attention instance holds: embedding, attention, norms, routers, output head.
    pub attention: u64,
    /// Parameters of all FFN instances together: dense layers, routed and shared experts.
    pub ffn: u64,
}

impl ModelConfig {
    /// Counts the text model's parameters.
    pub fn parameters(&self) -> ParameterCount {
        let [hidden, heads, head_dim, share_q] =
            [self.hidden_size, self.num_heads, self.head_dim, self.share_q_dim].map(|size| size as u128);
        let layers = self.num_layers as u128;
        let moe_layers = self.num_moe_layers() as u128;
        let table = self.vocab_size as u128 * hidden;
        let projections =
            hidden * share_q + 2 * hidden * head_dim + share_q * heads * head_dim + heads * head_dim * hidden;
        let norms = layers * (2 * hidden + share_q) + hidden;
        let routers = moe_layers * self.num_experts as u128 * hidden;
        let attention = 2 * table + layers * projections + norms + routers;

        let gated = |width: usize| 3 * hidden * width as u128;
        let dense = (layers - moe_layers) * gated(self.intermediate_size);
        let shared = moe_layers * gated(self.share_expert_dim);
        let routed = |experts: usize| moe_layers * experts as u128 * gated(self.moe_intermediate_size);
        let ffn = dense + shared + routed(self.num_experts);
        let count = |parameters: u128| u64::try_from(parameters).unwrap_or(u64::MAX);
        ParameterCount {
            total: count(attention + ffn),
            activated: count(attention - table + dense + shared + routed(self.top_k)),
            attention: count(attention),
            ffn: count(ffn),
        }
    }

    /// Parameters that the FFN instance `shard` holds, of a checkpoint whose weights are not FP8.
    pub fn ffn_parameters(&self, shard: Shard) -> u64 {
        let gated = |width: usize| 3 * self.hidden_size as u128 * width as u128;
        let moe_layers = self.num_moe_layers() as u128;
        let dense = (self.num_layers as u128 - moe_layers) * gated(shard.range_of(self.intermediate_size, 1).len());
        let shared = moe_layers * gated(shard.range_of(self.share_expert_dim, 1).len());
        let part = shard.of_expert().range_of(self.moe_intermediate_size, 1).len();
        let routed = moe_layers * shard.experts(self).len() as u128 * gated(part);
        u64::try_from(dense + shared + routed).unwrap_or(u64::MAX)
    }

    /// Bytes of the weights of both sides, attention and all FFN instances together, as a checkpoint of this
    /// configuration has them: bf16, or block-FP8 linear layers with f32 scales and all else bf16.
    pub fn weight_bytes(&self) -> (u64, u64) {
        let count = self.parameters();
        if !self.fp8_weights {
            return (2 * count.attention, 2 * count.ffn);
        }
        let fp8 = |parameters: u64| parameters + 4 * parameters.div_ceil((FP8_GROUP * FP8_GROUP) as u64);
        let (hidden, all_heads) = (self.hidden_size as u64, (self.num_heads * self.head_dim) as u64);
        let (share_q, head_dim) = (self.share_q_dim as u64, self.head_dim as u64);
        let layer = hidden * share_q + 2 * hidden * head_dim + share_q * all_heads + all_heads * hidden;
        let linear = layer.saturating_mul(self.num_layers as u64);
        (2 * count.attention.saturating_sub(linear) + fp8(linear), fp8(count.ffn))
    }

    /// Bytes of one token in the key/value cache, over all layers.
    pub fn kv_bytes_per_token(&self, dtype: Dtype) -> usize {
        self.num_layers * self.kv_elements_per_layer() * dtype.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The released model: the class defaults of its configuration (paper, Table 1).
    fn released() -> ModelConfig {
        let moe: Vec<String> = (4..60).map(|layer| layer.to_string()).collect();
        let json = format!(
            r#"{{"model_type": "step3_vl", "text_config": {{"model_type": "step3_text", "hidden_size": 7168,
            "intermediate_size": 18432, "num_attention_heads": 64, "num_attention_groups": 1, "num_hidden_layers": 61,
            "max_seq_len": 65536, "vocab_size": 128815, "rms_norm_eps": 1e-5, "moe_intermediate_size": 5120,
            "moe_num_experts": 48, "moe_top_k": 3, "rope_theta": 500000, "rope_scaling": null,
            "max_position_embedding": 65536, "share_expert_dim": 5120, "share_q_dim": 2048, "head_dim": 256,
            "norm_expert_weight": false, "moe_layers_enum": "{}"}}}}"#,
            moe.join(",")
        );
        ModelConfig::from_json(&json, "config.json").unwrap()
    }

    #[test]
    fn the_released_model_has_the_published_size() {
        let config = released();
        let count = config.parameters();
        assert_eq!((count.total as f64 / 1e6).round() / 1e3, 316.295);
        assert_eq!((count.activated as f64 / 1e6).round() / 1e3, 37.918);
        assert_eq!(count.total, count.attention + count.ffn);
        assert_eq!(config.kv_bytes_per_token(Dtype::Bf16), 61 * 512 * 2);
        assert_eq!(config.kv_bytes_per_token(Dtype::F32), 61 * 512 * 4);
    }

    #[test]
    fn the_released_checkpoints_have_the_published_sizes() {
        // The text model's share of 641.9 and 327.6 GB; the rest is vision (facts: 641.92 and 327.57 with it).
        let mut config = released();
        let total = |config: &ModelConfig| {
            let (attention, ffn) = config.weight_bytes();
            (attention + ffn) as f64 / 1e9
        };
        assert_eq!((total(&config) * 10.0).round() / 10.0, 632.6);
        config.fp8_weights = true;
        assert_eq!((total(&config) * 10.0).round() / 10.0, 318.2);
    }

    #[test]
    fn shards_hold_all_parameters_between_them() {
        let config = released();
        for count in [1, 2, 5, 48, 61] {
            let held: u64 = (0..count).map(|i| config.ffn_parameters(Shard::new(i, count).unwrap())).sum();
            assert_eq!(held, config.parameters().ffn);
        }
    }
}
