//! Daemons as threads with a scheduler, and what they are to decode.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test binary uses its part")]

use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;
use stepmesh_mesh::Policy;
use stepmesh_mesh::control::{BlockingClient, ConnectOptions};
use stepmesh_mesh::scheduler::{Background, SchedulerOptions, ServeOptions, spawn};
use stepmesh_model::Dtype;
use stepmesh_pipeline::{
    AttentionOptions, CheckpointSource, DaemonError, DaemonOptions, FfnOptions, Shutdown, run_attention, run_ffn,
};
use stepmesh_proto::control::{GenerateRequest, generate_event::Body};
use stepmesh_transport::Provider;

/// The tiny checkpoint; on a machine that only runs the tests, where the environment says.
pub fn fixture() -> PathBuf {
    let package = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(package).join("../fixtures/step3-tiny")
}

pub struct Deployment {
    scheduler: Option<Background>,
    /// Attention instances first.
    daemons: Vec<(Shutdown, JoinHandle<Result<(), DaemonError>>)>,
}

impl Deployment {
    pub fn start(attention: u32, ffn: u32, microbatches: u16, transport: Provider, dtype: Dtype) -> Self {
        Self::with(attention, ffn, &fixture(), |options| {
            options.transport = transport;
            options.microbatches = microbatches;
            options.dtype = dtype;
        })
    }

    /// Daemons of a checkpoint, whose names begin with their role.
    pub fn with(attention: u32, ffn: u32, checkpoint: &Path, change: impl Fn(&mut DaemonOptions)) -> Self {
        let scheduler = spawn(ServeOptions::new(SchedulerOptions::new(attention, ffn))).unwrap();
        let mut daemons = Vec::new();
        let options = |name: String| {
            let mut options = DaemonOptions {
                name,
                gpu: std::env::var("STEPMESH_TEST_GPU").ok().map(|index| index.parse().unwrap()),
                ..DaemonOptions::new(scheduler.url(), CheckpointSource::Directory(checkpoint.into()))
            };
            change(&mut options);
            options
        };
        for rank in 0..attention {
            let (daemon, shutdown) = (options(format!("attention-{rank}")), Shutdown::default());
            let (options, asked) = (AttentionOptions { daemon, kv_tokens: 4096, queue: 64 }, shutdown.clone());
            daemons.push((shutdown, std::thread::spawn(move || run_attention(options, &asked, &mut |_| {}))));
        }
        for rank in 0..ffn {
            let (daemon, shutdown) = (options(format!("ffn-{rank}")), Shutdown::default());
            let (options, asked) = (FfnOptions { daemon, policy: Policy::All }, shutdown.clone());
            daemons.push((shutdown, std::thread::spawn(move || run_ffn(options, &asked, &mut |_| {}))));
        }
        Self { scheduler: Some(scheduler), daemons }
    }

    /// Asks the last daemon to go, and waits until it is gone.
    pub fn stop_last(&mut self) {
        let (shutdown, daemon) = self.daemons.pop().unwrap();
        shutdown.trigger();
        daemon.join().unwrap().unwrap();
    }

    /// Why daemons ended, once one of them has by itself.
    pub fn errors(mut self) -> Vec<String> {
        while !self.daemons.iter().any(|(_, daemon)| daemon.is_finished()) {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.daemons.iter().for_each(|(shutdown, _)| shutdown.trigger());
        let ended = self.daemons.drain(..).filter_map(|(_, daemon)| daemon.join().unwrap().err());
        ended.map(|error| error.to_string()).collect()
    }

    pub fn client(&self) -> BlockingClient {
        let url = self.scheduler.as_ref().unwrap().url();
        let client = BlockingClient::connect(&ConnectOptions::new(url)).unwrap();
        client.wait_complete(Duration::from_secs(60)).unwrap();
        client
    }

    pub fn stop(mut self) {
        self.daemons.iter().for_each(|(shutdown, _)| shutdown.trigger());
        for (_, daemon) in self.daemons.drain(..) {
            daemon.join().unwrap().unwrap();
        }
        self.scheduler.take();
    }
}

/// Tokens and logits of one sequence, `[new, vocabulary]`.
pub fn generate(client: &BlockingClient, request: GenerateRequest) -> (Vec<u32>, Vec<f32>) {
    let (mut tokens, mut logits) = (Vec::new(), Vec::new());
    for event in client.generate(request).unwrap() {
        if let Body::Token(token) = event.unwrap() {
            tokens.push(token.token);
            logits.extend(token.logits.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        }
    }
    (tokens, logits)
}

/// Prompt and greedy tokens of each case.
pub fn golden(dtype: &str) -> Vec<(Vec<u32>, Vec<u32>)> {
    let text = std::fs::read_to_string(fixture().join(format!("golden_{dtype}.json"))).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let cases: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    cases.iter().map(|case| (ids(&case["prompt"]), ids(&case["greedy"]))).collect()
}

pub fn golden_logits(dtype: &str, case: usize) -> Vec<f32> {
    let bytes = std::fs::read(fixture().join(format!("golden_{dtype}.safetensors"))).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(&format!("logits.{case}")).unwrap();
    tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}
