//! The model's shape, read from a checkpoint's `config.json`.

mod fields;

use std::path::Path;

use crate::ModelError;
use crate::fp8::FP8_GROUP;
use fields::Fields;

/// Step-3's text model: sizes, layer kinds and token ids (paper, Table 1).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Width of the residual stream and of every row that travels between the sides.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads; all share one key/value head.
    pub num_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Width of the low-rank query that all heads share.
    pub share_q_dim: usize,
    /// Token ids run from 0 to `vocab_size - 1`.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub context_length: usize,
    /// Intermediate width of a dense layer.
    pub intermediate_size: usize,
    /// Routed experts of a MoE layer.
    pub num_experts: usize,
    /// Experts that a token goes to.
    pub top_k: usize,
    /// Intermediate width of a routed expert.
    pub moe_intermediate_size: usize,
    /// Intermediate width of the shared expert.
    pub share_expert_dim: usize,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub norm_expert_weight: bool,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f32,
    /// Token that starts a sequence, where the checkpoint names one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence; empty where the checkpoint names none.
    pub eos_token_ids: Vec<u32>,
    /// Whether the configuration says that linear layers are block-FP8. What a weight is, its tensor decides.
    pub fp8_weights: bool,
    moe_layers: Vec<bool>,
}

/// No size in a configuration may exceed this; larger ones are damage, and products of them would overflow.
const LARGEST_SIZE: usize = 1 << 24;
/// Expert ids travel as `u16`.
const MOST_EXPERTS: usize = 1 << 16;
const MOST_LAYERS: usize = 1 << 12;

impl ModelConfig {
    /// Reads `config.json` in `dir`, and the token ids of `generation_config.json` where that file exists (they win).
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Json`], or [`ModelError::Config`] naming the field.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let json = std::fs::read_to_string(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        let mut config = Self::from_json(&json, &path.display().to_string())?;

        let path = dir.join("generation_config.json");
        match std::fs::read_to_string(&path) {
            Ok(json) => config.read_token_ids(&Fields::parse(&json, &path.display().to_string())?)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(ModelError::Io { path, source }),
        }
        Ok(config)
    }

    /// Reads a configuration from JSON text: the text model's own, or the outer `step3_vl` one with a `text_config`.
    /// `origin` names the text in errors.
    ///
    /// # Errors
    /// [`ModelError::Json`], or [`ModelError::Config`] naming the field.
    pub fn from_json(json: &str, origin: &str) -> Result<Self, ModelError> {
        let outer = Fields::parse(json, origin)?;
        let text = outer.object("text_config")?;
        let fields = text.as_ref().unwrap_or(&outer);
        refuse_other_models(fields)?;
        let fp8_weights = is_fp8(&outer)? || is_fp8(fields)?;

        let size = |name| fields.size(name, LARGEST_SIZE);
        let num_layers = fields.size("num_hidden_layers", MOST_LAYERS)?;
        let mut config = Self {
            hidden_size: size("hidden_size")?,
            num_layers,
            num_heads: size("num_attention_heads")?,
            head_dim: size("head_dim")?,
            share_q_dim: size("share_q_dim")?,
            vocab_size: size("vocab_size")?,
            context_length: context_length(fields)?,
            intermediate_size: size("intermediate_size")?,
            num_experts: fields.size("moe_num_experts", MOST_EXPERTS)?,
            top_k: size("moe_top_k")?,
            moe_intermediate_size: size("moe_intermediate_size")?,
            share_expert_dim: size("share_expert_dim")?,
            norm_expert_weight: fields.flag("norm_expert_weight")?.unwrap_or(false),
            rms_norm_eps: fields
                .number("rms_norm_eps")?
                .ok_or_else(|| fields.error("rms_norm_eps", "is missing; it is a number such as 1e-5"))?,
            rope_theta: rope_theta(fields)?,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            fp8_weights,
            moe_layers: moe_layers(fields, num_layers)?,
        };
        if !config.head_dim.is_multiple_of(2) {
            return Err(fields.error("head_dim", "is odd; rotary embedding turns pairs of elements"));
        }
        if config.top_k > config.num_experts {
            let reason = format!("is {}, more than the {} experts", config.top_k, config.num_experts);
            return Err(fields.error("moe_top_k", reason));
        }
        if config.rms_norm_eps <= 0.0 {
            return Err(fields.error("rms_norm_eps", "must be above zero"));
        }
        config.read_token_ids(&outer)?;
        if let Some(text) = &text {
            config.read_token_ids(text)?;
        }
        Ok(config)
    }

    /// Whether `layer` is a mixture-of-experts layer; any other is dense. Layers that do not exist are not.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.moe_layers.get(layer).copied().unwrap_or(false)
    }

    /// Mixture-of-experts layers in the model.
    pub fn num_moe_layers(&self) -> usize {
        self.moe_layers.iter().filter(|moe| **moe).count()
    }

    /// Elements of one token in one layer of the key/value cache: one key and one value, shared by all heads.
    pub fn kv_elements_per_layer(&self) -> usize {
        2 * self.head_dim
    }

    fn read_token_ids(&mut self, fields: &Fields<'_>) -> Result<(), ModelError> {
        if let Some(ids) = fields.token_ids("bos_token_id", self.vocab_size)? {
            self.bos_token_id = ids.first().copied();
        }
        if let Some(ids) = fields.token_ids("eos_token_id", self.vocab_size)? {
            self.eos_token_ids = ids;
        }
        Ok(())
    }
}

fn refuse_other_models(fields: &Fields<'_>) -> Result<(), ModelError> {
    if let Some(kind) = fields.text("model_type")?
        && kind != "step3_text"
        && kind != "step3_vl"
    {
        return Err(fields.error("model_type", format!("is `{kind}`; this crate runs `step3_text` and `step3_vl`")));
    }
    if let Some(activation) = fields.text("hidden_act")?
        && activation != "silu"
    {
        return Err(fields.error("hidden_act", format!("is `{activation}`; Step-3's activation is `silu`")));
    }
    match fields.size_if_present("num_attention_groups", LARGEST_SIZE)? {
        None | Some(1) => Ok(()),
        Some(groups) => {
            Err(fields.error("num_attention_groups", format!("is {groups}; Step-3 shares 1 key/value head (use 1)")))
        }
    }
}

/// Whether weights are block-FP8; other ways of quantising are refused.
fn is_fp8(fields: &Fields<'_>) -> Result<bool, ModelError> {
    let Some(quantisation) = fields.object("quantization_config")? else { return Ok(false) };
    for (name, known) in [("quant_method", "fp8"), ("fmt", "e4m3"), ("activation_scheme", "dynamic")] {
        if let Some(found) = quantisation.text(name)?
            && found != known
        {
            return Err(
                quantisation.error(name, format!("is `{found}`; of quantised checkpoints only `{known}` is known"))
            );
        }
    }
    match quantisation.layer_list("weight_block_size")? {
        Some(block) if block == [FP8_GROUP, FP8_GROUP] => Ok(true),
        found => {
            let found = found.map_or("missing".to_owned(), |block| format!("{block:?}"));
            Err(quantisation.error("weight_block_size", format!("is {found}; blocks of [128, 128] are known")))
        }
    }
}

fn context_length(fields: &Fields<'_>) -> Result<usize, ModelError> {
    for name in ["max_position_embedding", "max_position_embeddings", "max_seq_len"] {
        if let Some(length) = fields.size_if_present(name, LARGEST_SIZE)? {
            return Ok(length);
        }
    }
    Err(fields.error("max_position_embedding", "is missing, and so are `max_position_embeddings` and `max_seq_len`"))
}

fn rope_theta(fields: &Fields<'_>) -> Result<f32, ModelError> {
    let mut theta = fields.number("rope_theta")?;
    for name in ["rope_parameters", "rope_scaling"] {
        let Some(rope) = fields.object(name)? else { continue };
        for key in ["rope_type", "type"] {
            if let Some(kind) = rope.text(key)?
                && kind != "default"
            {
                return Err(rope.error(key, format!("is `{kind}`; only `default` rotary embedding is known")));
            }
        }
        theta = rope.number("rope_theta")?.or(theta);
    }
    match theta {
        Some(theta) if theta > 1.0 => Ok(theta),
        Some(theta) => Err(fields.error("rope_theta", format!("is {theta}; it must be above 1"))),
        None => Err(fields.error("rope_theta", "is missing, and `rope_parameters.rope_theta` too")),
    }
}

/// Absent: every layer but the first. The released files spell the list as a comma-separated string.
fn moe_layers(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<bool>, ModelError> {
    let name = "moe_layers_enum";
    let Some(listed) = fields.layer_list(name)? else {
        return Ok((0..num_layers).map(|layer| layer > 0).collect());
    };
    let mut moe = vec![false; num_layers];
    for layer in listed {
        let Some(kind) = moe.get_mut(layer) else {
            return Err(fields.error(name, format!("lists layer {layer}, but there are {num_layers} layers")));
        };
        *kind = true;
    }
    Ok(moe)
}
