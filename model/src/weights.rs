//! The weights of a layer, by the names that a checkpoint gives them, as either side of the model holds them.

use crate::load::{Loaded, Loader};
use crate::mlp::Mlp;
use crate::{ModelConfig, ModelError, Shard};

/// What the attention side holds of a layer.
#[derive(Debug)]
pub(crate) struct AttentionLayer<M> {
    pub(crate) input_norm: Vec<f32>,
    pub(crate) query_down: M,
    pub(crate) key: M,
    pub(crate) value: M,
    pub(crate) query_norm: Vec<f32>,
    pub(crate) query_up: M,
    pub(crate) output: M,
    pub(crate) post_norm: Vec<f32>,
    pub(crate) router: Option<M>,
}

impl<M: Loaded> AttentionLayer<M> {
    pub(crate) fn load(loader: &Loader<'_>, config: &ModelConfig, layer: usize) -> Result<Self, ModelError> {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let (hidden, share_q, head_dim) = (config.hidden_size, config.share_q_dim, config.head_dim);
        let all_heads = config.num_heads * head_dim;
        let router = || loader.matrix(&name("moe.gate"), config.num_experts, hidden);
        Ok(Self {
            input_norm: loader.norm(&name("input_layernorm"), hidden)?,
            query_down: loader.matrix(&name("self_attn.q_proj"), share_q, hidden)?,
            key: loader.matrix(&name("self_attn.k_proj"), head_dim, hidden)?,
            value: loader.matrix(&name("self_attn.v_proj"), head_dim, hidden)?,
            query_norm: loader.norm(&name("self_attn.inter_norm"), share_q)?,
            query_up: loader.matrix(&name("self_attn.wq"), all_heads, share_q)?,
            output: loader.matrix(&name("self_attn.o_proj"), hidden, all_heads)?,
            post_norm: loader.norm(&name("post_attention_layernorm"), hidden)?,
            router: config.is_moe(layer).then(router).transpose()?,
        })
    }
}

/// What an FFN shard holds of a layer.
#[derive(Debug)]
pub(crate) enum FfnLayer<M> {
    Dense(Mlp<M>),
    Moe {
        /// The first expert held.
        first: usize,
        experts: Vec<Mlp<M>>,
        shared: Mlp<M>,
    },
}

impl<M: Loaded> FfnLayer<M> {
    pub(crate) fn load(
        loader: &Loader<'_>,
        config: &ModelConfig,
        shard: Shard,
        layer: usize,
    ) -> Result<Self, ModelError> {
        let hidden = config.hidden_size;
        let prefix = format!("model.layers.{layer}");
        if !config.is_moe(layer) {
            let full = config.intermediate_size;
            return Ok(Self::Dense(loader.mlp(&format!("{prefix}.mlp"), hidden, full, shard)?));
        }
        let held = shard.experts(config);
        let first = held.start;
        let stacked = format!("{prefix}.moe");
        let expert = |e| {
            loader.stacked_mlp(&stacked, hidden, config.moe_intermediate_size, config.num_experts, e, shard.of_expert())
        };
        let full = config.share_expert_dim;
        Ok(Self::Moe {
            first,
            experts: held.map(expert).collect::<Result<_, _>>()?,
            shared: loader.mlp(&format!("{prefix}.share_expert"), hidden, full, shard)?,
        })
    }
}
