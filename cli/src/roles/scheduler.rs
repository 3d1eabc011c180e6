//! `stepmesh scheduler`.

use super::log::{Log, start};
use crate::deployment::LISTENING;
use crate::error::CliError;
use crate::output::say;
use crate::settings::{SchedulerSettings, Secret, read_token};
use crate::signals::{self, Interrupt};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use stepmesh_mesh::scheduler::{SchedulerOptions, ServeError, ServeOptions, Server};
use stepmesh_transport::into_background;

/// Serves until a signal; says where on a line of its own.
pub(crate) fn run_scheduler(settings: &SchedulerSettings, log: Log) -> Result<(), CliError> {
    start(log);
    let options = options(settings)?;
    into_background();
    signals::runtime()?.block_on(async {
        let mut interrupt = Interrupt::new()?;
        let server = Server::bind(options).await?;
        say(&format!("{LISTENING}http://{}", reachable(server.address())))?;
        server.run(async move { interrupt.arrived().await }).await?;
        Ok(())
    })
}

fn options(settings: &SchedulerSettings) -> Result<ServeOptions, CliError> {
    let token = read_token(settings.token.as_ref(), settings.token_file.as_deref())?;
    let mut deployment = SchedulerOptions::new(settings.attention.get(), settings.ffn.get());
    deployment.heartbeat = Duration::from_millis(settings.heartbeat_ms);
    deployment.loss = Duration::from_millis(settings.loss_ms);
    deployment.link_timeout = Duration::from_millis(settings.link_timeout_ms);
    deployment.max_sequences = settings.max_sequences;
    let mut options = ServeOptions::new(deployment);
    options.listen = settings.listen;
    options.token = token.as_ref().map(Secret::token).transpose()?;
    options.insecure = settings.insecure;
    options.drain = Duration::from_millis(settings.drain_timeout_ms);
    Ok(options)
}

/// Where a process of this host reaches what listens on `address`.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

impl From<ServeError> for CliError {
    fn from(error: ServeError) -> Self {
        match error {
            ServeError::Open { .. } | ServeError::Options(_) => Self::plain_input(error.to_string()),
            _ => Self::failed(error.to_string()),
        }
    }
}
