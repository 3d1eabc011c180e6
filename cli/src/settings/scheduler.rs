//! The scheduler's settings.

use super::{Layer, Secret, aliases, settings};
use crate::error::CliError;
use std::net::{SocketAddr, ToSocketAddrs};
use std::num::NonZeroU32;
use std::path::PathBuf;

settings! {
    SchedulerLayer => SchedulerSettings, aliases: from_aliases;
    /// Address and port to listen on; port 0 lets the system choose
    #[arg(value_name = "ADDRESS:PORT")]
    listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 7400)),
    /// Attention instances of the deployment
    #[arg(value_name = "N")]
    attention: NonZeroU32 = NonZeroU32::MIN,
    /// FFN instances of the deployment
    #[arg(value_name = "N")]
    ffn: NonZeroU32 = NonZeroU32::MIN,
    /// Token that members and clients must show. Visible in the process list: prefer STEPMESH_TOKEN or --token-file
    token: Secret,
    /// File whose first line is the token
    #[arg(value_name = "FILE")]
    token_file: PathBuf,
    /// Listen on a non-loopback address without a token
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    insecure: bool = false,
    /// How often a member says that it lives
    #[arg(value_name = "MS")]
    heartbeat_ms: u64 = 250,
    /// Silence after which a member is lost
    #[arg(value_name = "MS")]
    loss_ms: u64 = 3_000,
    /// Longest that a link may take to come up or to be fenced
    #[arg(value_name = "MS")]
    link_timeout_ms: u64 = 60_000,
    /// Sequences in flight at most
    #[arg(value_name = "N")]
    max_sequences: usize = 65_536,
    /// After SIGTERM: how long members may take to leave before the scheduler is ended
    #[arg(value_name = "MS")]
    drain_timeout_ms: u64 = 5_000,
}

fn from_aliases(variable: aliases::Variables<'_>) -> Result<SchedulerLayer, CliError> {
    let root = aliases::scheduler_host_and_port(variable)?;
    Ok(SchedulerLayer {
        listen: root.map(|(host, port)| resolve_host(&host, port)).transpose()?,
        attention: aliases::number(variable, "DMLC_NUM_WORKER")?,
        ffn: aliases::number(variable, "DMLC_NUM_SERVER")?,
        ..SchedulerLayer::default()
    })
}

fn resolve_host(host: &str, port: u16) -> Result<SocketAddr, CliError> {
    let unknown = |reason: String| {
        CliError::plain_input(format!("DMLC_PS_ROOT_URI names `{host}`, which has no address here: {reason}"))
    };
    let mut addresses = (host, port).to_socket_addrs().map_err(|error| unknown(error.to_string()))?;
    addresses.next().ok_or_else(|| unknown("nothing found".into()))
}
