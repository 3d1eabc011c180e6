//! The tiny model in one process: an attention side, some FFN shards, and the golden results of the reference.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test binary uses its part")]

pub mod files;

use std::path::PathBuf;

use safetensors::SafeTensors;
use stepmesh_model::cuda::{CudaAttention, CudaFfn};
use stepmesh_model::{
    AttentionStage, Checkpoint, CpuAttention, CpuFfn, Dtype, FfnInput, FfnStage, Hidden, KvCache, LoadOptions,
    ModelConfig, Row, SequenceId, Shard, fp8_groups, quantise_rows,
};

/// The GPU that the tests are to run on, by `STEPMESH_TEST_GPU`; the CPU if there is none.
pub fn gpu() -> Option<u32> {
    std::env::var("STEPMESH_TEST_GPU").ok().map(|index| index.parse().unwrap())
}

/// Where the checkpoints are; on a machine that only runs the tests, where the environment says.
fn fixtures() -> PathBuf {
    let package = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(package).join("../fixtures")
}

pub fn fixture(file: &str) -> PathBuf {
    fixtures().join("step3-tiny").join(file)
}

/// A file of the checkpoint whose linear layers are FP8.
pub fn fp8_fixture(file: &str) -> PathBuf {
    fixtures().join("step3-tiny-fp8").join(file)
}

pub fn checkpoint() -> Checkpoint {
    Checkpoint::open(&fixture("")).unwrap()
}

/// Tensors and prompts that the reference implementation wrote.
pub struct Golden {
    bytes: Vec<u8>,
    pub prompts: Vec<Prompt>,
}

pub struct Prompt {
    pub tokens: Vec<u32>,
    pub greedy: Vec<u32>,
}

impl Golden {
    /// `name` is `golden_f32` or `golden_bf16`.
    pub fn read(name: &str) -> Self {
        Self::read_from(fixture(name))
    }

    /// `path` has no extension.
    pub fn read_from(path: PathBuf) -> Self {
        let json = std::fs::read_to_string(path.with_extension("json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let ids = |value: &serde_json::Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let prompts = json.as_array().unwrap().iter();
        let prompts = prompts.map(|p| Prompt { tokens: ids(&p["prompt"]), greedy: ids(&p["greedy"]) }).collect();
        Self { bytes: std::fs::read(path.with_extension("safetensors")).unwrap(), prompts }
    }

    pub fn find(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).ok()?;
        Some(tensor.data().as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect())
    }

    pub fn tensor(&self, name: &str) -> Vec<f32> {
        self.find(name).unwrap_or_else(|| panic!("no golden tensor {name}"))
    }
}

/// Both sides and a cache.
pub struct Model {
    pub attention: Box<dyn AttentionStage>,
    pub ffns: Vec<Box<dyn FfnStage>>,
    pub cache: KvCache,
    /// Whether rows go to the FFN side as FP8.
    pub fp8_wire: bool,
}

impl Model {
    pub fn new(dtype: Dtype, shards: usize) -> Self {
        Self::of(&checkpoint(), dtype, shards, 1)
    }

    /// A model of `checkpoint` whose experts are cut among `tensor` shards each.
    pub fn of(checkpoint: &Checkpoint, dtype: Dtype, shards: usize, tensor: usize) -> Self {
        Self::on(gpu(), checkpoint, dtype, shards, tensor)
    }

    /// As [`Model::of`], on that GPU or on the CPU.
    pub fn on(gpu: Option<u32>, checkpoint: &Checkpoint, dtype: Dtype, shards: usize, tensor: usize) -> Self {
        let options = LoadOptions::new(dtype);
        let ffn = |index| -> Box<dyn FfnStage> {
            let shard = Shard::with_tensor_parallel(index, shards, tensor).unwrap();
            match gpu {
                None => Box::new(CpuFfn::load(checkpoint, dtype, shard).unwrap()),
                Some(index) => Box::new(CudaFfn::load(checkpoint, options, shard, index, &mut |_| {}).unwrap()),
            }
        };
        let attention: Box<dyn AttentionStage> = match gpu {
            None => Box::new(CpuAttention::load(checkpoint, dtype).unwrap()),
            Some(index) => {
                let mut stage = CudaAttention::load(checkpoint, options, index, &mut |_| {}).unwrap();
                // So that the tiny model's sequences are cut, too.
                stage.set_split(128).unwrap();
                Box::new(stage)
            }
        };
        let cache = attention.new_cache(1024).unwrap();
        Self { attention, ffns: (0..shards).map(ffn).collect(), cache, fp8_wire: false }
    }

    pub fn config(&self) -> ModelConfig {
        self.attention.config().clone()
    }

    /// The whole model over one batch of rows; returns the logits of every row.
    pub fn run(&mut self, rows: &[Row], tokens: &[u32]) -> Vec<f32> {
        let config = self.config();
        let mut x = vec![0.0; rows.len() * config.hidden_size];
        let mut y = x.clone();
        self.attention.embed(tokens, &mut x).unwrap();
        for layer in 0..config.num_layers {
            self.attention.attention(layer, rows, &mut x, &mut self.cache, &mut y).unwrap();
            let partials = self.ffn(layer, &y);
            let partials: Vec<&[f32]> = partials.iter().map(Vec::as_slice).collect();
            self.attention.combine(&mut x, &partials).unwrap();
        }
        let mut logits = vec![0.0; rows.len() * config.vocab_size];
        self.attention.logits(&x, &mut logits).unwrap();
        logits
    }

    /// Every shard's part of a layer's output for one segment of rows.
    pub fn ffn(&mut self, layer: usize, y: &[f32]) -> Vec<Vec<f32>> {
        let config = self.config();
        let choices = if config.is_moe(layer) { y.len() / config.hidden_size * config.top_k } else { 0 };
        let (mut ids, mut weights) = (vec![0; choices], vec![0.0; choices]);
        if config.is_moe(layer) {
            self.attention.route(layer, y, &mut ids, &mut weights).unwrap();
        }
        let (mut codes, mut scales) =
            (vec![0; y.len()], vec![0.0; y.len() / config.hidden_size * fp8_groups(config.hidden_size)]);
        quantise_rows(y, config.hidden_size, &mut codes, &mut scales).unwrap();
        let hidden = if self.fp8_wire { Hidden::Fp8 { codes: &codes, scales: &scales } } else { Hidden::Plain(y) };
        let input = FfnInput { hidden, experts: &ids, weights: &weights };
        let part = |ffn: &mut Box<dyn FfnStage>| {
            let mut out = vec![0.0; y.len()];
            ffn.forward(layer, &[input], &mut out).unwrap();
            out
        };
        self.ffns.iter_mut().map(part).collect()
    }

    /// Runs `tokens` from position `first` on in chunks of `chunk`; returns the logits of the last token.
    pub fn feed(&mut self, sequence: SequenceId, first: usize, tokens: &[u32], chunk: usize) -> Vec<f32> {
        let mut last = Vec::new();
        for (i, tokens) in tokens.chunks(chunk).enumerate() {
            let start = first + i * chunk;
            let rows: Vec<Row> = (start..start + tokens.len()).map(|position| Row { sequence, position }).collect();
            let logits = self.run(&rows, tokens);
            last = logits[(tokens.len() - 1) * self.config().vocab_size..].to_vec();
        }
        last
    }
}

/// Largest and mean absolute difference.
pub fn difference(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert_eq!(a.len(), b.len());
    let all = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    (all.clone().fold(0.0, f32::max), all.sum::<f32>() / a.len() as f32)
}
