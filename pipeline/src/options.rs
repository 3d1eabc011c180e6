//! How the daemons are started: plain values with defaults that work on one host.

use crate::Wire;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use stepmesh_mesh::Policy;
use stepmesh_mesh::control::Token;
use stepmesh_model::Dtype;
use stepmesh_transport::{DeviceOptions, Provider, Waker};

/// Where the model comes from.
#[derive(Clone, Debug)]
pub enum CheckpointSource {
    /// A directory in HuggingFace's layout.
    Directory(PathBuf),
    /// Carried in the program.
    Embedded {
        /// `config.json`.
        config: &'static str,
        /// `model.safetensors`.
        weights: &'static [u8],
    },
}

/// Where a daemon that computes on a GPU has its slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Slots {
    /// In the GPU's memory, where kernels work in them; in pinned memory under a provider that moves bytes by the CPU. Over shared
    /// memory all daemons must have them there.
    #[default]
    Gpu,
    /// In pinned host memory: copy engines move hidden states there and back, and the CPU waits for none of it.
    Pinned,
    /// In host memory: hidden states pass the CPU, which waits for the GPU in each layer.
    Host,
}

/// What both daemons need to know.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    /// The scheduler's URL, `http://host:port`.
    pub scheduler: String,
    /// The cluster's token, if the scheduler wants one.
    pub token: Option<Token>,
    /// For people: what the others call this daemon in their messages.
    pub name: String,
    /// The rank to ask for; the lowest free one otherwise.
    pub rank: Option<u32>,
    /// The data plane.
    pub transport: Provider,
    /// How its device is opened.
    pub device: DeviceOptions,
    /// Lanes of each link.
    pub lanes: u8,
    /// The model.
    pub checkpoint: CheckpointSource,
    /// What is computed in.
    pub dtype: Dtype,
    /// What rows travel as.
    pub wire: Wire,
    /// FFN instances that each routed expert is cut among; it divides their number.
    pub tensor_parallel: u32,
    /// Threads that compute, the one that drives the mesh included.
    pub threads: usize,
    /// The GPU that computes; the CPU does if there is none.
    pub gpu: Option<u32>,
    /// Where hidden states are on their way, if a GPU computes.
    pub slots: Slots,
    /// Microbatches in flight.
    pub microbatches: u16,
    /// Most rows (tokens) of one attention instance in one microbatch and step.
    pub max_rows: u32,
    /// Most bytes of registered memory.
    pub memory_limit_bytes: usize,
    /// How long to keep trying to reach the scheduler.
    pub join_timeout: Duration,
    /// How long a link may take to come up.
    pub connect_timeout: Duration,
}

impl DaemonOptions {
    /// The defaults: shared memory, three microbatches, 32 rows each, f32.
    pub fn new(scheduler: impl Into<String>, checkpoint: CheckpointSource) -> Self {
        Self {
            scheduler: scheduler.into(),
            token: None,
            name: String::new(),
            rank: None,
            transport: Provider::Shm,
            device: DeviceOptions::default(),
            lanes: 1,
            checkpoint,
            dtype: Dtype::F32,
            wire: Wire::of(Dtype::F32),
            tensor_parallel: 1,
            threads: 1,
            gpu: None,
            slots: Slots::Gpu,
            microbatches: 3,
            max_rows: 32,
            memory_limit_bytes: 4 << 30,
            join_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
        }
    }
}

/// An attention daemon's options.
#[derive(Clone, Debug)]
pub struct AttentionOptions {
    /// What both daemons need.
    pub daemon: DaemonOptions,
    /// Tokens that the KV cache holds, over all sequences.
    pub kv_tokens: usize,
    /// Sequences that may wait for room before more are refused.
    pub queue: usize,
}

/// An FFN daemon's options.
#[derive(Clone, Debug)]
pub struct FfnOptions {
    /// What both daemons need.
    pub daemon: DaemonOptions,
    /// When a batch is released.
    pub policy: Policy,
}

/// What a daemon tells whoever started it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Reading weights: bytes done and in all.
    Loading {
        /// Done.
        done: u64,
        /// In all.
        total: u64,
    },
    /// Admitted with this rank.
    Joined {
        /// The rank.
        rank: u32,
    },
    /// The whole deployment is there.
    Ready {
        /// The membership's number.
        epoch: u64,
    },
    /// A member is lost: what it was, and why.
    PeerLost(String),
    /// A link ended while its peer is still a member.
    LinkDown(String),
    /// The scheduler wants this daemon to finish and go.
    Draining,
}

/// Asks a running daemon to stop. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    inner: Arc<ShutdownInner>,
}

#[derive(Debug, Default)]
struct ShutdownInner {
    asked: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
}

impl Shutdown {
    /// Asks; wakes the daemons that sleep.
    pub fn trigger(&self) {
        self.inner.asked.store(true, Ordering::Release);
        for waker in self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            waker.wake();
        }
    }

    /// Whether it was asked for.
    pub fn is_triggered(&self) -> bool {
        self.inner.asked.load(Ordering::Acquire)
    }

    /// Wakes this endpoint too when triggered.
    pub fn watch(&self, waker: Waker) {
        self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner).push(waker);
    }
}
