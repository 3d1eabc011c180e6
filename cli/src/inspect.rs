//! `stepmesh inspect`: what model a checkpoint holds, read from its headers.

use crate::error::CliError;
use crate::output::say;
use crate::units;
use serde::Serialize;
use std::num::NonZeroU32;
use std::path::PathBuf;
use stepmesh_model::{Checkpoint, Dtype, Inventory, ModelConfig, ModelError, Shard};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What `inspect` is asked.
#[derive(clap::Args, Debug)]
pub(crate) struct InspectArguments {
    /// Directory with config.json and, if they are there, safetensors
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Attention instances of the deployment in mind
    #[arg(long, value_name = "N", default_value_t = NonZeroU32::MIN)]
    attention: NonZeroU32,
    /// FFN instances of the deployment in mind
    #[arg(long, value_name = "N", default_value_t = NonZeroU32::MIN)]
    ffn: NonZeroU32,
    /// FFN instances that each routed expert is cut among; it divides their number
    #[arg(long, value_name = "N", default_value_t = NonZeroU32::MIN)]
    tensor_parallel: NonZeroU32,
    /// Print the card as JSON
    #[arg(long)]
    json: bool,
}

/// What a model card says.
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
    parameters: Parameters,
    /// `bf16`, or `fp8` where linear layers are block-FP8.
    weights: &'static str,
    bytes: Bytes,
    deployment: String,
    /// In bf16.
    kv_bytes_per_token: usize,
    tokenizer: bool,
    /// Weight files, 0 where there is only a configuration.
    shards: usize,
    skipped: Skipped,
}

#[derive(Serialize, Debug)]
struct Parameters {
    total: u64,
    activated: u64,
    attention: u64,
    ffn: u64,
}

/// Bytes of weights: of a side, and of one instance of it; of FFN instances the one that holds most.
#[derive(Serialize, Debug)]
struct Bytes {
    attention: u64,
    ffn: u64,
    attention_instance: u64,
    ffn_instance: u64,
}

/// Vision, and what else no daemon reads.
#[derive(Serialize, Debug)]
struct Skipped {
    tensors: usize,
    bytes: u64,
}

/// Prints the card. A directory without weights still has one.
pub(crate) fn run(arguments: &InspectArguments) -> Result<(), CliError> {
    let card = read(arguments)?;
    if arguments.json {
        let text = serde_json::to_string_pretty(&card)
            .map_err(|error| CliError::failed(format!("cannot write JSON: {error}")))?;
        return say(&text);
    }
    card.lines().iter().try_for_each(|(name, value)| say(&format!("{name:<12} {value}")))
}

fn read(arguments: &InspectArguments) -> Result<Card, CliError> {
    let directory = &arguments.directory;
    let refused = |error: ModelError| CliError::plain_input(error.to_string());
    let has_weights = [SINGLE, INDEX].iter().any(|name| directory.join(name).exists());
    let (config, inventory) = if has_weights {
        let checkpoint = Checkpoint::open(directory).map_err(refused)?;
        (checkpoint.config().clone(), checkpoint.inventory())
    } else {
        let config = ModelConfig::from_dir(directory).map_err(refused)?;
        let (attention_bytes, ffn_bytes) = config.weight_bytes();
        (config.clone(), Inventory { attention_bytes, ffn_bytes, fp8: config.fp8_weights, ..Inventory::default() })
    };
    let count = config.parameters();
    let (ffn, tensor) = (arguments.ffn.get(), arguments.tensor_parallel.get());
    let mut largest = 0;
    for index in 0..ffn {
        let shard = Shard::with_tensor_parallel(index as usize, ffn as usize, tensor as usize).map_err(refused)?;
        largest = largest.max(config.ffn_parameters(shard));
    }
    let share = largest as f64 / count.ffn.max(1) as f64;
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
        parameters: Parameters {
            total: count.total,
            activated: count.activated,
            attention: count.attention,
            ffn: count.ffn,
        },
        weights: if inventory.fp8 { "fp8" } else { "bf16" },
        bytes: Bytes {
            attention: inventory.attention_bytes,
            ffn: inventory.ffn_bytes,
            attention_instance: inventory.attention_bytes,
            ffn_instance: (inventory.ffn_bytes as f64 * share).round() as u64,
        },
        deployment: format!("{}A{ffn}F", arguments.attention),
        kv_bytes_per_token: config.kv_bytes_per_token(Dtype::Bf16),
        tokenizer: directory.join("tokenizer.json").exists(),
        shards: inventory.files,
        skipped: Skipped { tensors: inventory.skipped_tensors, bytes: inventory.skipped_bytes },
    })
}

impl Card {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let Self { parameters, bytes, .. } = self;
        let side = |count, all, each| {
            let (count, all, each) = (units::count(count), units::bytes(all), units::bytes(each));
            format!("{count} parameters, {all} in {}; {each} an instance of {}", self.weights, self.deployment)
        };
        let weights = match self.shards {
            0 => "none here: config.json only".to_owned(),
            1 => format!("1 file, {}", units::bytes(bytes.attention + bytes.ffn)),
            files => format!("{files} files, {}", units::bytes(bytes.attention + bytes.ffn)),
        };
        let skipped = match self.skipped.tensors {
            0 => String::new(),
            count => format!("; {count} tensors of vision are skipped, {}", units::bytes(self.skipped.bytes)),
        };
        vec![
            (
                "model",
                format!(
                    "{} parameters, {} activated per token",
                    units::count(parameters.total),
                    units::count(parameters.activated)
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
            ("attn side", side(parameters.attention, bytes.attention, bytes.attention_instance)),
            ("FFN side", side(parameters.ffn, bytes.ffn, bytes.ffn_instance)),
            (
                "KV cache",
                format!("{} per token in bf16, twice that in f32", units::bytes(self.kv_bytes_per_token as u64),),
            ),
            ("weights", weights + &skipped),
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
    use std::path::Path;

    fn ask(directory: &Path, ffn: u32, tensor: u32) -> InspectArguments {
        InspectArguments {
            directory: directory.into(),
            attention: NonZeroU32::MIN,
            ffn: NonZeroU32::new(ffn).unwrap(),
            tensor_parallel: NonZeroU32::new(tensor).unwrap(),
            json: false,
        }
    }

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
    }

    #[test]
    fn a_checkpoints_card_counts_what_its_file_holds() {
        let card = read(&ask(&fixture("step3-tiny"), 1, 1)).unwrap();
        assert_eq!((card.layers, card.moe_layers, card.experts, card.shards), (4, 2, 8, 1));
        assert_eq!(card.bytes.attention + card.bytes.ffn, 2 * card.parameters.total);
        assert_eq!((card.bytes.ffn, card.weights), (card.bytes.ffn_instance, "bf16"));
        assert!(card.lines().iter().any(|(name, value)| *name == "weights" && value.starts_with("1 file, 6.6 MiB")));
    }

    #[test]
    fn the_card_of_an_fp8_checkpoint_is_the_same_from_its_headers_and_from_its_configuration() {
        let from_headers = read(&ask(&fixture("step3-tiny-fp8"), 4, 2)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(fixture("step3-tiny-fp8").join("config.json"), dir.path().join("config.json")).unwrap();
        let from_config = read(&ask(dir.path(), 4, 2)).unwrap();
        assert_eq!((from_headers.weights, from_config.weights, from_config.shards), ("fp8", "fp8", 0));
        assert_eq!(from_headers.bytes.ffn, from_config.bytes.ffn);
        assert_eq!(from_headers.bytes.attention, from_config.bytes.attention);
        assert_eq!(from_headers.bytes.ffn_instance * 4, from_headers.bytes.ffn);
        assert!(read(&ask(dir.path(), 4, 3)).unwrap_err().to_string().contains("groups of 3"));
    }

    #[test]
    fn a_directory_that_is_no_checkpoint_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = read(&ask(dir.path(), 1, 1)).unwrap_err();
        assert_eq!(error.code(), 2);
        assert!(error.to_string().contains("config.json"), "{error}");
    }
}
