//! The settings of a whole deployment on this host: `up`.

use super::member::{cores, nonzero};
use super::{Layer, Precision, ReleasePolicy, Secret, SlotMemory, Transport, settings};
use std::net::SocketAddr;
use std::num::{NonZeroU8, NonZeroU16, NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

settings! {
    DeploymentLayer => DeploymentSettings;
    /// Directory with config.json and safetensors [default: the small checkpoint that the program carries]
    #[arg(value_name = "DIR")]
    checkpoint: PathBuf,
    /// Attention instances
    #[arg(value_name = "N")]
    attention: NonZeroU32 = nonzero!(NonZeroU32, 2),
    /// FFN instances
    #[arg(value_name = "N")]
    ffn: NonZeroU32 = nonzero!(NonZeroU32, 2),
    /// Microbatches in flight
    #[arg(value_name = "M")]
    microbatches: NonZeroU16 = nonzero!(NonZeroU16, 3),
    /// The data plane: shm for processes of one host, tcp for any
    transport: Transport = Transport::Shm,
    /// What is computed in
    dtype: Precision = Precision::F32,
    /// What rows travel as [default: what suits --dtype]
    wire: Precision,
    /// FFN instances that each routed expert is cut among (tensor parallel); it divides their number, and groups of
    /// so many share out the experts (expert parallel)
    #[arg(value_name = "N")]
    tensor_parallel: NonZeroU32 = NonZeroU32::MIN,
    /// Threads that compute; of each daemon; 0 shares the cores out among them
    #[arg(value_name = "N")]
    threads: usize = 0,
    /// GPU that computes, for all daemons [default: the CPU does]
    #[arg(value_name = "INDEX")]
    gpu: u32,
    /// Where hidden states are on their way, if a GPU computes
    slots: SlotMemory = SlotMemory::Gpu,
    /// Address and port of the scheduler; port 0 lets the system choose
    #[arg(value_name = "ADDRESS:PORT")]
    listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 0)),
    /// Token that clients must show. Visible in the process list: prefer STEPMESH_TOKEN or --token-file
    token: Secret,
    /// File whose first line is the token
    #[arg(value_name = "FILE")]
    token_file: PathBuf,
    /// Listen on a non-loopback address without a token
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    insecure: bool = false,
    /// Lanes of each link
    #[arg(value_name = "N")]
    lanes: NonZeroU8 = NonZeroU8::MIN,
    /// Most tokens of one attention instance in one microbatch and step
    #[arg(value_name = "N")]
    max_rows: NonZeroU32 = nonzero!(NonZeroU32, 32),
    /// Most registered memory of each daemon
    #[arg(value_name = "MIB")]
    memory_limit_mib: usize = 4096,
    /// Tokens that each attention instance's KV cache holds, over all its sequences
    #[arg(value_name = "N")]
    kv_tokens: NonZeroUsize = nonzero!(NonZeroUsize, 16384),
    /// When an FFN instance releases a batch: all, any, at-least:N or deadline:MICROSECONDS
    policy: ReleasePolicy = ReleasePolicy::All,
    /// How long to poll before sleeping; above 0 only where every process has a core of its own
    #[arg(value_name = "US")]
    spin_us: u64 = 0,
    /// How long the deployment may take to come up
    #[arg(value_name = "MS")]
    start_timeout_ms: u64 = 120_000,
}

impl DeploymentSettings {
    /// Threads that each daemon computes on.
    pub(crate) fn threads_each(&self) -> usize {
        let daemons = (self.attention.get() + self.ffn.get()) as usize;
        if self.threads == 0 { (cores() / daemons).max(1) } else { self.threads }
    }
}
