//! The settings of attention and FFN daemons: what both share, and what each adds.

use super::{
    Connect, Layer, Names, Precision, ReleasePolicy, Secret, SlotMemory, Transport, aliases, read_token, settings,
};
use crate::carried;
use crate::error::CliError;
use std::net::IpAddr;
use std::num::{NonZeroU8, NonZeroU16, NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;
use stepmesh_pipeline::DaemonOptions;
use stepmesh_transport::verbs::VerbsOptions;
use stepmesh_transport::{DeviceOptions, Provider};

/// `NonZero`s that are written as literals.
macro_rules! nonzero {
    ($type:ident, $value:literal) => {
        const {
            match $type::new($value) {
                Some(value) => value,
                None => $type::MIN,
            }
        }
    };
}
pub(super) use nonzero;

macro_rules! member {
    ($layer:ident => $settings:ident; $($own:tt)*) => {
        settings! {
            $layer => $settings, aliases: $layer::read_aliases;
            /// The scheduler's URL
            #[arg(value_name = "URL")]
            scheduler: String = "http://127.0.0.1:7400".to_owned(),
            /// Token that the scheduler wants. Visible in the process list: prefer STEPMESH_TOKEN or --token-file
            token: Secret,
            /// File whose first line is the token
            #[arg(value_name = "FILE")]
            token_file: PathBuf,
            /// What the others call this daemon in their messages [default: the host's name]
            name: String,
            /// Rank to ask for [default: the lowest free one]
            rank: u32,
            /// The data plane: shm for processes of one host, tcp for any, verbs for hosts with RDMA devices
            transport: Transport = Transport::Shm,
            /// tcp: address to bind and to give to peers
            address: IpAddr = IpAddr::from([127, 0, 0, 1]),
            /// tcp: port to listen on; 0 lets the system choose
            port: u16 = 0,
            /// tcp: how long a receive polls the network card's own queue (SO_BUSY_POLL); 0 is off
            #[arg(value_name = "US")]
            tcp_busy_poll_us: u64 = 0,
            /// verbs: the rails, such as mlx5_0,mlx5_1:2 (a device, its port) [default: the first with an active port]
            #[arg(value_name = "NAMES")]
            verbs_devices: Names,
            /// verbs: how queue pairs are connected; connection-manager needs librdmacm and an IP address on each rail
            verbs_connect: Connect = Connect::Descriptors,
            /// verbs: index of the GID to use [default: RoCE v2 with an IPv4 address, if there is one]
            #[arg(value_name = "N")]
            verbs_gid_index: u8,
            /// verbs: traffic class
            #[arg(value_name = "N")]
            verbs_traffic_class: u8 = 0,
            /// verbs: service level
            #[arg(value_name = "N")]
            verbs_service_level: u8 = 0,
            /// verbs: bytes of a packet: 256, 512, 1024, 2048 or 4096 [default: what the ports of both ends take]
            #[arg(value_name = "BYTES")]
            verbs_path_mtu: u16,
            /// Bind a non-loopback address though the scheduler wants no token
            #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
            insecure: bool = false,
            /// How long a connection may take to prove itself
            #[arg(value_name = "MS")]
            hello_timeout_ms: u64 = 5_000,
            /// How long to poll before sleeping; above 0 only where every process has a core of its own
            #[arg(value_name = "US")]
            spin_us: u64 = 0,
            /// Lanes of each link
            #[arg(value_name = "N")]
            lanes: NonZeroU8 = NonZeroU8::MIN,
            /// Directory with config.json and safetensors [default: the small checkpoint that the program carries]
            #[arg(value_name = "DIR")]
            checkpoint: PathBuf,
            /// What is computed in
            dtype: Precision = Precision::F32,
            /// What rows travel as [default: what suits --dtype]
            wire: Precision,
            /// FFN instances that each routed expert is cut among (tensor parallel); it divides their number, and groups of
            /// so many share out the experts (expert parallel)
            #[arg(value_name = "N")]
            tensor_parallel: NonZeroU32 = NonZeroU32::MIN,
            /// Threads that compute; 0 takes as many as there are cores
            #[arg(value_name = "N")]
            threads: usize = 0,
            /// GPU that computes, as the driver counts those that are visible [default: the CPU does]
            #[arg(value_name = "INDEX")]
            gpu: u32,
            /// Where hidden states are on their way, if a GPU computes
            slots: SlotMemory = SlotMemory::Gpu,
            /// Microbatches in flight
            #[arg(value_name = "M")]
            microbatches: NonZeroU16 = nonzero!(NonZeroU16, 3),
            /// Most tokens of one attention instance in one microbatch and step
            #[arg(value_name = "N")]
            max_rows: NonZeroU32 = nonzero!(NonZeroU32, 32),
            /// Most registered memory
            #[arg(value_name = "MIB")]
            memory_limit_mib: usize = 4096,
            /// How long to keep trying to reach the scheduler
            #[arg(value_name = "MS")]
            join_timeout_ms: u64 = 30_000,
            /// How long a link may take to come up
            #[arg(value_name = "MS")]
            connect_timeout_ms: u64 = 10_000,
            /// After SIGTERM: how long the daemon may take to leave before it is ended
            #[arg(value_name = "MS")]
            drain_timeout_ms: u64 = 5_000,
            $($own)*
        }

        impl $layer {
            fn read_aliases(variable: aliases::Variables<'_>) -> Result<Self, CliError> {
                let root = aliases::scheduler_host_and_port(variable)?;
                Ok(Self {
                    scheduler: root.map(|(host, port)| aliases::url(&host, port)),
                    rank: aliases::number(variable, "DMLC_NODE_RANK")?,
                    ..Self::default()
                })
            }
        }

        impl $settings {
            /// What the pipeline's daemons of both kinds are told.
            pub(crate) fn daemon_options(&self) -> Result<DaemonOptions, CliError> {
                let token = read_token(self.token.as_ref(), self.token_file.as_deref())?;
                let options = DaemonOptions::new(self.scheduler.clone(), carried::source(self.checkpoint.as_deref()));
                let options = DaemonOptions {
                    token: token.as_ref().map(Secret::token).transpose()?,
                    name: self.name.clone().unwrap_or_else(host_name),
                    rank: self.rank,
                    transport: self.transport.into(),
                    device: DeviceOptions {
                        address: self.address,
                        port: self.port,
                        hello_timeout: Duration::from_millis(self.hello_timeout_ms),
                        spin: Duration::from_micros(self.spin_us),
                        busy_poll: Duration::from_micros(self.tcp_busy_poll_us),
                        gpu: None,
                        gpu_staging: false,
                        verbs: VerbsOptions {
                            devices: self.verbs_devices.clone().map(Vec::from).unwrap_or_default(),
                            connect: self.verbs_connect.into(),
                            gid_index: self.verbs_gid_index,
                            traffic_class: self.verbs_traffic_class,
                            service_level: self.verbs_service_level,
                            path_mtu_bytes: self.verbs_path_mtu,
                            ..VerbsOptions::default()
                        },
                    },
                    lanes: self.lanes.get(),
                    dtype: self.dtype.into(),
                    wire: self.wire.unwrap_or(self.dtype).into(),
                    tensor_parallel: self.tensor_parallel.get(),
                    threads: if self.threads == 0 { cores() } else { self.threads },
                    gpu: self.gpu,
                    slots: self.slots.into(),
                    microbatches: self.microbatches.get(),
                    max_rows: self.max_rows.get(),
                    memory_limit_bytes: self.memory_limit_mib.saturating_mul(1 << 20),
                    join_timeout: Duration::from_millis(self.join_timeout_ms),
                    connect_timeout: Duration::from_millis(self.connect_timeout_ms),
                    ..options
                };
                refuse_open_address(&options, self.insecure)?;
                Ok(options)
            }
        }
    };
}

member! {
    AttentionLayer => AttentionSettings;
    /// Tokens that the KV cache holds, over all sequences
    #[arg(value_name = "N")]
    kv_tokens: NonZeroUsize = nonzero!(NonZeroUsize, 16384),
    /// Sequences that may wait for room before more are refused
    #[arg(value_name = "N")]
    queue: usize = 1024,
}

member! {
    FfnLayer => FfnSettings;
    /// When a batch is released: all, any, at-least:N or deadline:MICROSECONDS
    policy: ReleasePolicy = ReleasePolicy::All,
}

/// Without a token, whoever reaches the scheduler could have himself linked with this daemon.
fn refuse_open_address(options: &DaemonOptions, insecure: bool) -> Result<(), CliError> {
    let address = options.device.address;
    if options.transport == Provider::Tcp && !address.is_loopback() && options.token.is_none() && !insecure {
        return Err(CliError::input(
            format!("{address} can be reached from other hosts, but there is no token"),
            "give the cluster's token with --token-file, or say --insecure if the network is trusted",
        ));
    }
    Ok(())
}

/// Cores that this process may run on.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get())
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
