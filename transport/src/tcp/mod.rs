//! The `tcp` provider: any two hosts, no RDMA.
//!
//! An endpoint listens on one address; a link has one connection per lane, dialled by its active side. Every connection
//! proves the link secret (`hello`) before a frame of it is parsed, and every frame is checked against what the link
//! has granted (`grants`) before its payload is received, straight into the target region (`inbox`). Work leaves
//! straight from its region (`outbox`). One epoll set drives all of an endpoint's sockets, but for those that
//! are tried directly while bytes move on them (`lively`); there is no thread and no runtime. A lane neither allocates nor copies in its steady state, but for payloads that arrive together with their
//! header.
//!
//! What a NIC's acknowledgements do, frames do here: signalled work is done when the peer's endpoint has placed its bytes
//! (so a refused access is never reported as done), and that needs the peer to poll. A silent host is noticed within ten
//! seconds; a live peer that does not poll for ten seconds while bytes wait for it counts as gone.
//!
//! A link that was closed while work was queued still sends that work, for a second at most and as long as the endpoint is
//! polled; what it receives meanwhile is discarded.
//!
//! A large read's bytes are taken from the peer's region as they leave. A write that is posted after it on the same
//! lane, to the same place, may overtake them: await the read first.

mod descriptor;
mod endpoint;
mod frame;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod grants;
mod greeting;
mod hello;
mod inbox;
mod lane;
mod linger;
mod link;
mod lively;
mod memory;
mod outbox;
mod poller;
mod progress;
mod socket;

use crate::memory::Registered;
use crate::{
    Access, Device, DeviceOptions, Endpoint, HostMemory, Memory, Placement, Properties, Provider, Region,
    TransportError,
};
use std::sync::Arc;

/// Lanes that a link may have.
const MAX_LANES: u8 = 8;

/// Opens the provider. The address in `options` is bound by each endpoint, so a port other than 0 suits one endpoint.
pub fn open(options: &DeviceOptions) -> Result<Arc<dyn Device>, TransportError> {
    if options.address.is_unspecified() {
        let what = format!("address {}: name the one that peers shall dial", options.address);
        return Err(TransportError::invalid(what));
    }
    Ok(Arc::new(TcpDevice { options: options.clone() }))
}

struct TcpDevice {
    options: DeviceOptions,
}

impl Device for TcpDevice {
    fn properties(&self) -> Properties {
        Properties {
            provider: Provider::Tcp,
            maps_peer_memory: false,
            max_lanes: MAX_LANES,
            max_inline: outbox::INLINE_BYTES,
            queue_depth: outbox::QUEUE_DEPTH,
            fetch_add: false,
            rails: 1,
        }
    }

    fn allocate(&self, len: usize, access: Access, placement: Option<Placement>) -> Result<Region, TransportError> {
        let memory = Arc::new(HostMemory::allocate(len, placement)?);
        Ok(Region::new(Arc::new(Registered { memory, access })))
    }

    fn register(&self, memory: Arc<dyn Memory>, access: Access) -> Result<Region, TransportError> {
        Registered::adopt(memory, access)
    }

    fn endpoint(&self) -> Result<Box<dyn Endpoint>, TransportError> {
        Ok(Box::new(endpoint::TcpEndpoint::new(&self.options)?))
    }
}
