//! `stepmesh inspect`: what model a checkpoint holds, read from its headers.

use crate::error::CliError;
use crate::output::say;
use crate::units;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use stepmesh_model::{Checkpoint, Dtype, ModelConfig};

/// What `inspect` is asked.
#[derive(clap::Args, Debug)]
pub(crate) struct InspectArguments {
    /// Directory with config.json and, if they are there, safetensors
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Print the card as JSON
    #[arg(long)]
    json: bool,
}

/// What a model card says. Bytes are for bf16 weights and cache.
#[derive(Serialize, Debug)]
struct Card {
    layers: usize,
    moe_layers: usize,
    hidden_size: usize,
    heads: usize,
    head_dim: usize,
    experts: usize,
    experts_per_token: usize,
    vocabulary: usize,
    context: usize,
    parameters: u64,
    parameters_activated: u64,
    attention_parameters: u64,
    attention_bytes_bf16: u64,
    ffn_parameters: u64,
    ffn_bytes_bf16: u64,
    kv_bytes_per_token_bf16: usize,
    kv_bytes_per_token_f32: usize,
    tokenizer: bool,
    weight_files: usize,
    weight_bytes: u64,
}

const INDEX: &str = "model.safetensors.index.json";

/// Prints the card. A directory without weights still has one.
pub(crate) fn run(arguments: &InspectArguments) -> Result<(), CliError> {
    let card = read(&arguments.directory)?;
    if arguments.json {
        let text = serde_json::to_string_pretty(&card)
            .map_err(|error| CliError::failed(format!("cannot write JSON: {error}")))?;
        return say(&text);
    }
    card.lines().iter().try_for_each(|(name, value)| say(&format!("{name:<12} {value}")))
}

fn read(directory: &Path) -> Result<Card, CliError> {
    let refused = |error: stepmesh_model::ModelError| CliError::plain_input(error.to_string());
    let has_weights = directory.join("model.safetensors").exists() || directory.join(INDEX).exists();
    let (config, weight_bytes) = if has_weights {
        let checkpoint = Checkpoint::open(directory).map_err(refused)?;
        (checkpoint.config().clone(), checkpoint.bytes())
    } else {
        (ModelConfig::from_dir(directory).map_err(refused)?, 0)
    };
    let count = config.parameters();
    let bytes = |parameters: u64| parameters.saturating_mul(Dtype::Bf16.bytes() as u64);
    Ok(Card {
        layers: config.num_layers,
        moe_layers: config.num_moe_layers(),
        hidden_size: config.hidden_size,
        heads: config.num_heads,
        head_dim: config.head_dim,
        experts: config.num_experts,
        experts_per_token: config.top_k,
        vocabulary: config.vocab_size,
        context: config.context_length,
        parameters: count.total,
        parameters_activated: count.activated,
        attention_parameters: count.attention,
        attention_bytes_bf16: bytes(count.attention),
        ffn_parameters: count.ffn,
        ffn_bytes_bf16: bytes(count.ffn),
        kv_bytes_per_token_bf16: config.kv_bytes_per_token(Dtype::Bf16),
        kv_bytes_per_token_f32: config.kv_bytes_per_token(Dtype::F32),
        tokenizer: directory.join("tokenizer.json").exists(),
        weight_files: if has_weights { weight_files(directory) } else { 0 },
        weight_bytes,
    })
}

/// How many files the index names; one where there is no index.
fn weight_files(directory: &Path) -> usize {
    let text = std::fs::read_to_string(directory.join(INDEX)).unwrap_or_default();
    let index: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let files: Option<BTreeSet<&str>> = index
        .get("weight_map")
        .and_then(|map| map.as_object())
        .map(|map| map.values().filter_map(serde_json::Value::as_str).collect());
    files.map_or(1, |files| files.len())
}

impl Card {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let side =
            |parameters, bytes| format!("{} parameters, {} in bf16", units::count(parameters), units::bytes(bytes));
        let weights = match self.weight_files {
            0 => "none here: config.json only".to_owned(),
            1 => format!("1 file, {}", units::bytes(self.weight_bytes)),
            files => format!("{files} files, {}", units::bytes(self.weight_bytes)),
        };
        vec![
            (
                "model",
                format!(
                    "{} parameters, {} activated per token",
                    units::count(self.parameters),
                    units::count(self.parameters_activated)
                ),
            ),
            (
                "layers",
                format!(
                    "{} ({} of them mixture of experts), hidden size {}",
                    self.layers, self.moe_layers, self.hidden_size
                ),
            ),
            ("attention", format!("{} heads of {}, one key/value head", self.heads, self.head_dim)),
            ("experts", format!("{}, of which {} a token, and a shared one", self.experts, self.experts_per_token)),
            ("vocabulary", self.vocabulary.to_string()),
            ("context", format!("{} tokens", self.context)),
            ("attn side", side(self.attention_parameters, self.attention_bytes_bf16)),
            ("FFN side", format!("{}, over all FFN instances", side(self.ffn_parameters, self.ffn_bytes_bf16))),
            (
                "KV cache",
                format!(
                    "{} per token in bf16, {} in f32",
                    units::bytes(self.kv_bytes_per_token_bf16 as u64),
                    units::bytes(self.kv_bytes_per_token_f32 as u64)
                ),
            ),
            ("weights", weights),
            (
                "tokenizer",
                if self.tokenizer { "tokenizer.json".into() } else { "none: prompts are token ids".to_owned() },
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_carried_checkpoints_card_counts_what_its_file_holds() {
        let card = read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/step3-tiny"))).unwrap();
        assert_eq!((card.layers, card.moe_layers, card.experts, card.weight_files), (4, 2, 8, 1));
        // BF16 tensors and a header of a few KiB.
        assert!(card.weight_bytes - card.parameters * 2 < 8192);
        assert!(card.lines().iter().any(|(name, value)| *name == "weights" && value.starts_with("1 file, 6.6 MiB")));
    }

    #[test]
    fn a_directory_that_is_no_checkpoint_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = read(dir.path()).unwrap_err();
        assert_eq!(error.code(), 2);
        assert!(error.to_string().contains("config.json"), "{error}");
    }
}
