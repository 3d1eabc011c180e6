//! The `shm` provider: processes of one host that map each other's memory. Linux only.
//!
//! A link begins as a connection of Unix sockets, over which the two ends prove the link secret to each other and then
//! pass file descriptors. From then on a write is a copy into the peer's mapped region, an immediate is one cache line
//! in a ring, and a system call is made only to wake a peer that sleeps. The socket stays open as the proof of life.
//!
//! ```text
//!   endpoint ── doorbell (one page) ───────────── mapped by every peer
//!     └─ link ─┬─ socket: hello, grants, hang-up
//!              ├─ rings: immediates, a lane and direction each (one memfd per link)
//!              └─ regions: granted by this side, imported from the other (one memfd per region)
//! ```
//!
//! Everything lives in sealed memfds and abstract sockets: a process that dies leaves nothing behind.

mod connection;
mod dial;
mod doorbell;
mod endpoint;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod hello;
mod link;
mod memory;
mod post;
#[cfg(not(stepmesh_loom))]
#[doc(hidden)]
pub mod probe;
mod progress;
mod rendezvous;
mod ring;
mod rings;
mod socket;
#[cfg(test)]
mod tests;
mod watch;
mod wire;

use crate::memory::Registered;
use crate::{
    Access, Device, DeviceOptions, Endpoint, HostMemory, Memory, Placement, Properties, Provider, Region,
    TransportError,
};
use std::sync::Arc;

const MAX_LANES: u8 = 8;
const MAX_INLINE: usize = 256;

/// Opens the provider.
pub fn open(options: &DeviceOptions) -> Result<Arc<dyn Device>, TransportError> {
    crate::copy::prepare();
    Ok(Arc::new(ShmDevice { options: options.clone() }))
}

struct ShmDevice {
    options: DeviceOptions,
}

impl Device for ShmDevice {
    fn properties(&self) -> Properties {
        Properties {
            provider: Provider::Shm,
            maps_peer_memory: true,
            max_lanes: MAX_LANES,
            max_inline: MAX_INLINE,
            queue_depth: ring::CAPACITY,
            fetch_add: true,
            rails: 1,
        }
    }

    fn allocate(&self, len: usize, access: Access, placement: Option<Placement>) -> Result<Region, TransportError> {
        Ok(match access {
            Access::Local => {
                let region = Region::new(Arc::new(HostMemory::allocate(len, placement)?));
                memory::prefault(&region);
                region
            }
            Access::PeerRead | Access::PeerWrite => {
                Region::new(Arc::new(memory::SharedMemory::allocate(len, access, placement)?))
            }
        })
    }

    fn register(&self, memory: Arc<dyn Memory>, access: Access) -> Result<Region, TransportError> {
        if access == Access::Local {
            return Registered::adopt(memory, access);
        }
        Err(TransportError::Unsupported {
            what: format!("registering {} bytes of the caller's with shm for {access:?}", memory.len()),
            hint: "peers map what is granted: allocate the region on the device, and use it in place or copy".into(),
        })
    }

    fn endpoint(&self) -> Result<Box<dyn Endpoint>, TransportError> {
        Ok(Box::new(endpoint::ShmEndpoint::new(self.options.clone())?))
    }
}
