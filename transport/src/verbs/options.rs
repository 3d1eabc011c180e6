//! How an RDMA device is used.

use std::time::Duration;

/// Options of the `verbs` provider. The defaults suit one lossless fabric; both ends of a link should agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerbsOptions {
    /// The device, such as `mlx5_0`; none takes the first with an active port.
    pub device: Option<String>,
    /// Its port, from 1; none takes the first active one.
    pub port: Option<u8>,
    /// The index of the GID to use; none prefers RoCE v2 with an IPv4 address.
    pub gid_index: Option<u8>,
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
    /// Lets the device write memory out of order where it can; completions stay in order.
    pub relaxed_ordering: bool,
    /// How long a link may be silent before its peer is asked whether it is still there.
    pub keep_alive: Duration,
}

impl Default for VerbsOptions {
    fn default() -> Self {
        Self {
            device: None,
            port: None,
            gid_index: None,
            traffic_class: 0,
            service_level: 0,
            timeout: 13,
            retries: 4,
            not_ready_retries: 7,
            not_ready_timer: 12,
            queue_depth: 128,
            inline_bytes: super::INLINE_BYTES,
            relaxed_ordering: false,
            keep_alive: Duration::from_millis(250),
        }
    }
}
