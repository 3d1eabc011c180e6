//! How a member joins, read from `stepmesh.Options`.

use crate::error::Failure;
use crate::shared::seconds;
use pyo3::prelude::*;
use std::time::Duration;
use stepmesh_embed::Joining;
use stepmesh_mesh::control::{ConnectOptions, Token};
use stepmesh_mesh::threaded::ProgressOptions;
use stepmesh_mesh::{MemberOptions, PartSpec, SlotLayout};
use stepmesh_proto::MAX_LANES;
use stepmesh_transport::{DeviceOptions, Provider};

/// `stepmesh.PartSpec`.
#[derive(FromPyObject)]
struct Spec {
    row_bytes: u32,
    max_rows: u32,
}

/// `stepmesh.Layout`.
#[derive(FromPyObject)]
struct Layout {
    microbatches: u16,
    request: Vec<Spec>,
    reply: Vec<Spec>,
}

/// `stepmesh.Options`.
#[derive(FromPyObject)]
pub(crate) struct Options {
    scheduler: String,
    layout: Option<Layout>,
    transport: String,
    token: Option<String>,
    name: String,
    workload: String,
    rank: Option<u32>,
    lanes: u8,
    address: Option<String>,
    devices: Vec<String>,
    gid_index: Option<u8>,
    traffic_class: u8,
    service_level: u8,
    pub(crate) gpu: Option<u32>,
    spin_us: u64,
    progress: String,
    cpu: Option<usize>,
    memory_limit_bytes: usize,
    join_timeout: f64,
}

/// The options, checked.
pub(crate) struct Plan {
    pub(crate) joining: Joining,
    /// How the progress thread runs, if there is to be one.
    pub(crate) progress: Option<ProgressOptions>,
}

impl Options {
    /// `layout` in place of the options' own, if there is one.
    pub(crate) fn check(self, layout: Option<SlotLayout>) -> Result<Plan, Failure> {
        let invalid = |name: &str, why: String| Failure::Invalid(format!("{name}: {why}"));
        let specs = |specs: Vec<Spec>| {
            specs.into_iter().map(|Spec { row_bytes, max_rows }| PartSpec { row_bytes, max_rows }).collect()
        };
        // Those of fserver_lib, which have tables that the CPU writes and reads.
        let in_host_memory = layout.is_some();
        let layout = match (layout, self.layout) {
            (Some(layout), _) => layout,
            (None, Some(given)) => SlotLayout::new(given.microbatches, specs(given.request), specs(given.reply))
                .map_err(|error| invalid("layout", error.to_string()))?,
            (None, None) => return Err(invalid("layout", "a stepmesh.Layout is wanted".to_owned())),
        };
        if self.lanes == 0 || self.lanes > MAX_LANES {
            return Err(invalid("lanes", format!("{}: 1 to {MAX_LANES}", self.lanes)));
        }
        let provider: Provider = self
            .transport
            .parse()
            .map_err(|error: stepmesh_transport::TransportError| invalid("transport", error.to_string()))?;
        let mut member = MemberOptions::new(layout, self.workload);
        member.name = if self.name.is_empty() { "python".to_owned() } else { self.name };
        member.rank = self.rank;
        member.lanes = self.lanes;
        member.memory_limit_bytes = self.memory_limit_bytes;
        let spin = Duration::from_micros(self.spin_us);
        let mut device = DeviceOptions { spin, ..DeviceOptions::default() };
        if let Some(address) = self.address {
            device.address =
                address.parse().map_err(|_| invalid("address", format!("`{address}` is no IP address")))?;
        }
        (device.gpu, device.gpu_staging) = (self.gpu, in_host_memory);
        device.verbs.devices = self.devices;
        device.verbs.gid_index = self.gid_index;
        device.verbs.traffic_class = self.traffic_class;
        device.verbs.service_level = self.service_level;
        let token = self.token.map(Token::new).transpose().map_err(|error| invalid("token", error.to_string()))?;
        let connect = ConnectOptions::new(self.scheduler).token(token).timeout(seconds(Some(self.join_timeout))?);
        let progress = match self.progress.as_str() {
            "caller" => None,
            "thread" => Some(ProgressOptions { cpu: self.cpu, spin, ..ProgressOptions::default() }),
            other => return Err(invalid("progress", format!("`{other}`: \"caller\" or \"thread\""))),
        };
        Ok(Plan { joining: Joining { member, connect, provider, device }, progress })
    }
}
