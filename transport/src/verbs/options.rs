//! How an RDMA device is used.

use super::sys::{IBV_MTU_256, IBV_MTU_512, IBV_MTU_1024, IBV_MTU_2048, IBV_MTU_4096, ibv_mtu};
use crate::TransportError;
use std::ops::RangeInclusive;
use std::time::Duration;

/// The sizes of a packet's payload, and their codes.
const PATH_MTUS: [(u16, ibv_mtu); 5] =
    [(256, IBV_MTU_256), (512, IBV_MTU_512), (1024, IBV_MTU_1024), (2048, IBV_MTU_2048), (4096, IBV_MTU_4096)];

/// How queue pairs are connected. Both ends of a link must do it the same way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Connect {
    /// By what their descriptors say, which the control plane carries.
    #[default]
    Descriptors,
    /// By librdmacm, loaded at run time: for fabrics that must find or admit routes. Each rail needs an internet
    /// address; on InfiniBand, that of its IPoIB interface.
    ConnectionManager,
}

/// Options of the `verbs` provider. The defaults suit one lossless fabric; both ends of a link should agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerbsOptions {
    /// The rails, 1 to 8: devices such as `mlx5_0` (its first active port) or `mlx5_1:2` (its port 2). None takes the
    /// first device with an active port. Lane `i` of every link uses rail `i` modulo their number, here and at the peer,
    /// which may have another number of them.
    pub devices: Vec<String>,
    /// The index of the GID to use, on each rail; none prefers RoCE v2 with an IPv4 address.
    pub gid_index: Option<u8>,
    /// How queue pairs are connected.
    pub connect: Connect,
    /// The traffic class (RoCE: the IP header's DSCP and ECN bits).
    pub traffic_class: u8,
    /// The service level (RoCE: the priority).
    pub service_level: u8,
    /// How long an acknowledgement may take: 4.096 µs × 2^this, 0 to 31. Devices wait up to four times as long.
    pub timeout: u8,
    /// How often unacknowledged work is sent again before the peer counts as gone, 0 to 7 (7 is for ever on some
    /// devices).
    pub retries: u8,
    /// How often work is sent again while the peer has no receive posted, 0 to 7; 7 is for ever.
    pub not_ready_retries: u8,
    /// How long the peer waits between those, in the code of the InfiniBand specification (12 is 0.64 ms), 0 to 31.
    pub not_ready_timer: u8,
    /// Work requests that one lane holds.
    pub queue_depth: usize,
    /// Inline bytes to ask the device for, at most 256; what it does not take goes through a registered ring.
    pub inline_bytes: usize,
    /// Bytes of a packet's payload: 256, 512, 1024, 2048 or 4096, at most what the ports of both ends take; none takes
    /// that.
    pub path_mtu_bytes: Option<u16>,
    /// Lets the device write memory out of order where it can; completions stay in order.
    pub relaxed_ordering: bool,
    /// Pages are brought in when the device asks for them instead of being locked: for regions larger than the memory
    /// that may be locked, at the price of page faults on the data path. Refused where the device cannot do it.
    pub on_demand_paging: bool,
    /// How long a link may be silent before its peer is asked whether it is still there.
    pub keep_alive: Duration,
}

impl Default for VerbsOptions {
    fn default() -> Self {
        Self {
            devices: Vec::new(),
            gid_index: None,
            connect: Connect::Descriptors,
            traffic_class: 0,
            service_level: 0,
            timeout: 13,
            retries: 4,
            not_ready_retries: 7,
            not_ready_timer: 12,
            queue_depth: 128,
            inline_bytes: super::INLINE_BYTES,
            path_mtu_bytes: None,
            relaxed_ordering: false,
            on_demand_paging: false,
            keep_alive: Duration::from_millis(250),
        }
    }
}

impl VerbsOptions {
    /// Refuses what no device can do, by name.
    pub(super) fn check(&self) -> Result<(), TransportError> {
        let ranges: [(&str, usize, RangeInclusive<usize>); 7] = [
            ("service_level", self.service_level.into(), 0..=15),
            ("timeout", self.timeout.into(), 0..=31),
            ("retries", self.retries.into(), 0..=7),
            ("not_ready_retries", self.not_ready_retries.into(), 0..=7),
            ("not_ready_timer", self.not_ready_timer.into(), 0..=31),
            ("queue_depth", self.queue_depth, 4..=1 << 14),
            ("inline_bytes", self.inline_bytes, 0..=super::INLINE_BYTES),
        ];
        for (name, value, range) in ranges {
            if !range.contains(&value) {
                let (least, most) = range.into_inner();
                return Err(TransportError::invalid(format!("verbs: {name} is {value}, and can be {least} to {most}")));
            }
        }
        if self.keep_alive < Duration::from_millis(1) {
            let what = format!("verbs: keep_alive is {:?}, and can be 1 ms or more", self.keep_alive);
            return Err(TransportError::invalid(what));
        }
        self.path_mtu().map(|_| ())
    }

    /// The code of the path MTU that is asked for.
    pub(super) fn path_mtu(&self) -> Result<Option<ibv_mtu>, TransportError> {
        let Some(bytes) = self.path_mtu_bytes else { return Ok(None) };
        let code = PATH_MTUS.iter().find(|(size, _)| *size == bytes).map(|(_, code)| *code);
        code.map(Some).ok_or_else(|| {
            let sizes = PATH_MTUS.map(|(size, _)| size.to_string()).join(", ");
            TransportError::invalid(format!("verbs: path_mtu_bytes is {bytes}, and can be {sizes}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_device_can_do_is_refused_by_name() {
        let refused = |options: VerbsOptions, name: &str| {
            let why = options.check().unwrap_err().to_string();
            assert!(why.contains(name), "{why}");
        };
        let default = VerbsOptions::default();
        default.check().unwrap();
        refused(VerbsOptions { service_level: 16, ..default.clone() }, "service_level is 16");
        refused(VerbsOptions { timeout: 32, ..default.clone() }, "timeout is 32, and can be 0 to 31");
        refused(VerbsOptions { retries: 8, ..default.clone() }, "retries is 8");
        refused(VerbsOptions { not_ready_retries: 8, ..default.clone() }, "not_ready_retries is 8");
        refused(VerbsOptions { not_ready_timer: 32, ..default.clone() }, "not_ready_timer is 32");
        refused(VerbsOptions { queue_depth: 3, ..default.clone() }, "queue_depth is 3");
        refused(VerbsOptions { inline_bytes: 257, ..default.clone() }, "inline_bytes is 257");
        refused(VerbsOptions { keep_alive: Duration::ZERO, ..default.clone() }, "keep_alive is 0");
        refused(VerbsOptions { path_mtu_bytes: Some(1500), ..default }, "path_mtu_bytes is 1500, and can be 256, 512,");
    }

    #[test]
    fn a_path_mtu_has_the_code_of_its_size() {
        let code = |bytes| VerbsOptions { path_mtu_bytes: bytes, ..Default::default() }.path_mtu().unwrap();
        assert_eq!(code(None), None);
        assert_eq!(code(Some(256)), Some(IBV_MTU_256));
        assert_eq!(code(Some(4096)), Some(IBV_MTU_4096));
    }
}
