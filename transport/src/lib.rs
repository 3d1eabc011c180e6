//! One-sided transfers between registered buffers: devices, regions, lanes and completions.
//!
//! A [`Device`] allocates registered memory ([`Region`]), or registers the caller's, and makes [`Endpoint`]s. An endpoint owns the links to any
//! number of peers and the one completion queue they share. A link has 1 to 8 ordered *lanes*. Work is posted to a
//! lane in chains, and what happened is learnt from completions only.
//!
//! ```text
//!   Device ── allocate ──▶ Region ── grant(link) ──▶ descriptor ─┐ (control plane)
//!     └── endpoint ──▶ Endpoint ◀── import(link) ── RemoteRegion ◀┘
//!                        ├─ post(link, lane, chain)
//!                        └─ poll / wait ──▶ Completion
//! ```
//!
//! Providers: [`shm`] (processes of one host), [`tcp`] (anywhere), [`verbs`] (RDMA), [`mem`] (one process, virtual
//! clock, scripted faults). They pass one conformance suite, [`testing`], which a provider of your own can run too.
//! `examples/pingpong.rs` is an engine that uses this crate alone.
//!
//! # What is stable
//!
//! Versions follow Cargo's rule: what compiles against 0.x.y compiles against every later 0.x.z, and does what the documentation of both
//! says. A new 0.x may change it.
//!
//! * **The interface**: all that is public but [`mem`] and [`testing`], which are for tests. It does what the documentation says, for every
//!   provider alike; where providers differ, [`Properties`] says how. Make options with `..Default::default()`: they gain fields.
//! * **Between two processes**: both ends of a link are of one version of their provider's protocol. Another version is refused while the link
//!   is made, by an error that names both. Descriptors and grants are bytes for a peer that runs now: do not keep them.
//! * **The steady state**, which tests hold every version to: no allocation; on `shm`, while spinning, no system call; on `verbs` one post for a
//!   chain and no other. Figures in `docs/benchmarks.md` are measurements, and no promise.

mod background;
mod clock;
mod copy;
mod endpoint;
mod error;
#[cfg(test)]
#[path = "../../fuzz/inputs.rs"]
mod fuzz_inputs;
mod gate;
mod looks;
mod memory;
mod monotonic;
mod region;
mod sync;

pub mod cuda;
pub mod mem;
pub mod shm;
pub mod tcp;
pub mod testing;
pub mod verbs;

pub use background::into_background;
pub use clock::Clock;
pub use copy::{copy_for_peer, copy_from_peer, copy_to_slot};
pub use endpoint::{
    Completion, Descriptor, Device, DeviceOptions, Disconnect, Endpoint, LinkId, LinkSecret, LinkSpec, Op, Properties,
    Provider, Remote, Side, Source, Target, Wake, Waker, Work, WorkError,
};
pub use error::{PostError, TransportError};
pub use gate::GateSet;
pub use looks::between_looks;
pub use memory::{DmaBuf, HostMemory, Memory};
pub use region::{Access, AddressSpace, Placement, Region, RemoteRegion, page_bytes, round_to_page};

use std::sync::Arc;

/// Opens a provider that needs nothing but its name: `shm`, `tcp` or `verbs`. (`mem` devices come from a [`mem::Fabric`].)
pub fn open(provider: Provider, options: &DeviceOptions) -> Result<Arc<dyn Device>, TransportError> {
    let device = match provider {
        Provider::Shm => shm::open(options),
        Provider::Tcp => tcp::open(options),
        Provider::Verbs => verbs::open(options),
        Provider::Mem => Err(TransportError::Unsupported {
            what: "opening `mem` by name".into(),
            hint: "make a `mem::Fabric` and ask it for devices: both ends live in one process".into(),
        }),
    }?;
    Ok(match options.gpu {
        Some(index) if options.gpu_staging => cuda::beside_pinned(&cuda::Context::open(index)?, device),
        Some(index) => cuda::beside(&cuda::Context::open(index)?, device),
        None => device,
    })
}
