//! The `verbs` provider: reliable-connection queue pairs over InfiniBand or RoCE, through libibverbs.
//!
//! The library is loaded when the provider is opened; without it, or without a device, opening says so and nothing else
//! changes. A link has one queue pair for each lane and one for *control*, over which the two ends greet each other,
//! say why they end, and look whether the other is still alive. A *rail* is one port of the member's; all of an
//! endpoint's queue pairs on it complete into one queue.
//!
//! ```text
//!   Rails 1..8 (Context: device, port, protection domain)
//!     ├─ Registered ── a memory region on each rail for this side's own work, on memory allocated here or the caller's
//!     └─ Endpoint ── a CompletionQueue for each rail, polled in turn
//!          └─ Link ─┬─ Control: hello, welcome, ping, bye (32 bits each, no payload, no right to memory), on rail 0
//!                   ├─ Lane 0..8: posted work, pre-posted receives; lane i is on rail i modulo their number
//!                   └─ grants: a memory region on each of the link's rails, of this link only
//! ```
//!
//! The ends learn each other's queue pairs from their descriptors, or have them connected by the connection manager
//! (`connection_manager`), and greet on the control queue pair. The peer may have another number of rails; lane i joins
//! those that it falls on at either side. A port that goes down ends the links that have lanes on it, and no other.
//!
//! A link is ended by destroying its lanes, after which the device touches nothing for them, and then its grants; the
//! control queue pair outlives them for as long as its last word takes. What an RC queue pair cannot tell its peer (that
//! it is closed, that it was refused) goes that way.
//!
//! A silent peer is pinged; its device answers for it, so a process that lives but does not poll is alive. An access that
//! the peer's device refuses ends a link as refused only when the peer says so, too (within a second): the device of a
//! process that is being killed may withdraw its memory first.
//!
//! Little that is written from a region is copied at the post as well. Any other source region is kept alive until a
//! later signalled request of its lane completes, at most a quarter of the queue depth behind.

mod chain;
mod completion_queue;
mod connection_manager;
mod context;
mod control;
mod descriptor;
mod endpoint;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod gid;
mod lane;
mod library;
mod link;
mod memory;
mod options;
mod progress;
mod queue_pair;
mod rails;
mod refusal;
mod registration;
mod sleep;
mod sys;

pub use options::{Connect, VerbsOptions};

use crate::{Access, Device, DeviceOptions, Endpoint, Memory, Placement, Properties, Provider, Region, TransportError};
use rails::Rails;
use std::sync::Arc;
use std::time::Duration;

const MAX_LANES: u8 = 8;
/// Bytes that are copied at the post; into a registered ring where the device takes fewer.
const INLINE_BYTES: usize = 256;

/// Opens the devices that `options.verbs` names, or the first one with an active port.
pub fn open(options: &DeviceOptions) -> Result<Arc<dyn Device>, TransportError> {
    let rails = rails::open(&options.verbs)?;
    if options.verbs.on_demand_paging {
        rails.iter().try_for_each(memory::check_on_demand_paging)?;
    }
    Ok(Arc::new(VerbsDevice { rails, spin: options.spin }))
}

/// The names of this machine's RDMA devices; an error says why there are none.
pub fn device_names() -> Result<Vec<String>, TransportError> {
    context::device_names()
}

struct VerbsDevice {
    rails: Rails,
    spin: Duration,
}

impl Device for VerbsDevice {
    fn properties(&self) -> Properties {
        Properties {
            provider: Provider::Verbs,
            maps_peer_memory: false,
            max_lanes: MAX_LANES,
            max_inline: INLINE_BYTES,
            queue_depth: self.rails.iter().map(|rail| rail.limits.queue_depth).min().unwrap_or(0),
            fetch_add: self.rails.iter().all(|rail| rail.limits.atomics),
            rails: self.rails.len() as u8,
        }
    }

    fn allocate(&self, len: usize, access: Access, placement: Option<Placement>) -> Result<Region, TransportError> {
        Ok(Region::new(Arc::new(memory::Registered::allocate(&self.rails, len, access, placement)?)))
    }

    fn register(&self, memory: Arc<dyn Memory>, access: Access) -> Result<Region, TransportError> {
        Ok(Region::new(Arc::new(memory::Registered::adopt(&self.rails, memory, access)?)))
    }

    fn endpoint(&self) -> Result<Box<dyn Endpoint>, TransportError> {
        Ok(Box::new(endpoint::VerbsEndpoint::new(&self.rails, self.spin)?))
    }
}
