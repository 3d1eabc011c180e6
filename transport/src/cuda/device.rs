//! A provider's device with a GPU beside it: what payloads lie in is the GPU's, and whoever uses the device need not know.
//!
//! | provider | payloads | how a peer gets at them |
//! |---|---|---|
//! | `shm`, and others that map peer memory | device memory | opens it by a CUDA IPC handle, reads and produces in place |
//! | `verbs` | device memory | its network device reads and writes it: dma-buf, else peer memory |
//! | `tcp`, `mem` | pinned host memory, which streams copy to and from | as ever |
//!
//! [`beside_pinned`] does with every provider what is done with the last: on one host it costs copies by copy engines, and needs
//! no handles of GPU memory, which do not pass between containers.

use super::{Context, DeviceMemory, ExportedMemory, PeerMemory, PinnedMemory};
use crate::{
    Access, Completion, Descriptor, Device, Endpoint, LinkId, LinkSpec, Memory, Op, Placement, PostError, Properties,
    Provider, Region, RemoteRegion, TransportError, Waker, Work,
};
use std::any::Any;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What begins the descriptor of a region of device memory that peers open.
const MAGIC: &[u8; 8] = b"SMgpuR\x01\0";

/// The same device, whose payload regions are reachable by the GPU's streams.
pub fn beside(context: &Arc<Context>, device: Arc<dyn Device>) -> Arc<dyn Device> {
    Arc::new(GpuDevice { inner: device, context: context.clone(), pins: false, granted: Arc::default() })
}

/// The same device, whose payload regions are host memory that is pinned for the GPU, whatever the provider.
pub fn beside_pinned(context: &Arc<Context>, device: Arc<dyn Device>) -> Arc<dyn Device> {
    Arc::new(GpuDevice { inner: device, context: context.clone(), pins: true, granted: Arc::default() })
}

struct GpuDevice {
    inner: Arc<dyn Device>,
    context: Arc<Context>,
    /// Whether payloads are host memory in any case.
    pins: bool,
    granted: Arc<Kept>,
}

/// Device memory that peers were granted. It is neither freed, because a peer may still have it open and the driver leaves
/// undefined what becomes of that, nor given out again, because a former peer could write what a later one reads.
type Kept = Mutex<Vec<Arc<DeviceMemory>>>;

impl Device for GpuDevice {
    fn properties(&self) -> Properties {
        self.inner.properties()
    }

    fn allocate(&self, len: usize, access: Access, placement: Option<Placement>) -> Result<Region, TransportError> {
        self.inner.allocate(len, access, placement)
    }

    fn allocate_payload(
        &self,
        len: usize,
        access: Access,
        placement: Option<Placement>,
    ) -> Result<Region, TransportError> {
        let properties = self.properties();
        if self.places_payloads() {
            return Ok(PinnedMemory::pin(&self.context, self.inner.allocate(len, access, placement)?)?);
        }
        if placement.is_some() {
            return Err(TransportError::invalid("device memory is not placed: the driver chooses where it lies"));
        }
        match properties.maps_peer_memory {
            true => {
                let block = DeviceMemory::allocate(&self.context, len)?;
                Ok(Region::new(Arc::new(Shareable { block, access })))
            }
            false => self.inner.register(DeviceMemory::allocate(&self.context, len)?, access),
        }
    }

    fn places_payloads(&self) -> bool {
        let Properties { provider, maps_peer_memory, .. } = self.properties();
        self.pins || !maps_peer_memory && provider != Provider::Verbs
    }

    fn register(&self, memory: Arc<dyn Memory>, access: Access) -> Result<Region, TransportError> {
        self.inner.register(memory, access)
    }

    fn endpoint(&self) -> Result<Box<dyn Endpoint>, TransportError> {
        let (inner, Properties { provider, maps_peer_memory, .. }) = (self.inner.endpoint()?, self.properties());
        if !maps_peer_memory {
            return Ok(inner);
        }
        let (context, pins, granted) = (self.context.clone(), self.pins, self.granted.clone());
        Ok(Box::new(GpuEndpoint { inner, provider, context, pins, granted }))
    }
}

/// Device memory of this side that peers may be granted.
struct Shareable {
    block: Arc<DeviceMemory>,
    access: Access,
}

/// A peer's device memory, as far as it was granted.
struct Imported {
    memory: Arc<dyn Memory>,
    len: usize,
    writable: bool,
}

// SAFETY: all is the block's own promise.
unsafe impl Memory for Shareable {
    fn base(&self) -> NonNull<u8> {
        self.block.base()
    }

    fn len(&self) -> usize {
        self.block.len()
    }

    fn gpu(&self) -> Option<u32> {
        self.block.gpu()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

// SAFETY: all is the memory's own promise; it has at least so many bytes.
unsafe impl Memory for Imported {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    fn len(&self) -> usize {
        self.len
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn gpu(&self) -> Option<u32> {
        self.memory.gpu()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// An endpoint of a provider that maps peer memory, which grants and imports device memory, too.
struct GpuEndpoint {
    inner: Box<dyn Endpoint>,
    provider: Provider,
    context: Arc<Context>,
    pins: bool,
    granted: Arc<Kept>,
}

impl GpuEndpoint {
    fn refused(&self, what: impl Into<String>) -> TransportError {
        TransportError::Descriptor { provider: self.provider, what: what.into() }
    }
}

impl Endpoint for GpuEndpoint {
    fn open(&mut self, spec: LinkSpec) -> Result<(LinkId, Descriptor), TransportError> {
        self.inner.open(spec)
    }

    fn connect(&mut self, link: LinkId, peer: &[u8], timeout: Duration) -> Result<(), TransportError> {
        self.inner.connect(link, peer, timeout)
    }

    fn grant(&mut self, link: LinkId, region: &Region, access: Access) -> Result<Descriptor, TransportError> {
        let Some(own) = region.memory().as_any().downcast_ref::<Shareable>() else {
            return self.inner.grant(link, region, access);
        };
        if access == Access::Local || access > own.access {
            return Err(TransportError::invalid(format!(
                "granting {access:?} of a region allocated for {:?}",
                own.access
            )));
        }
        let grant = Grant { access, process: std::process::id(), memory: own.block.export()? };
        let mut granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        if !granted.iter().any(|known| Arc::ptr_eq(known, &own.block)) {
            granted.push(own.block.clone());
        }
        Ok(grant.encode())
    }

    fn import(
        &mut self,
        link: LinkId,
        descriptor: &[u8],
        placement: Option<Placement>,
    ) -> Result<RemoteRegion, TransportError> {
        if !descriptor.starts_with(MAGIC) {
            let mut remote = self.inner.import(link, descriptor, placement)?;
            if self.pins
                && let Some(mapped) = remote.mapped.take()
            {
                remote.mapped = Some(PinnedMemory::pin(&self.context, mapped)?);
            }
            return Ok(remote);
        }
        if placement.is_some() {
            return Err(TransportError::invalid(
                "a peer's device memory is not placed: the driver chooses where it lies",
            ));
        }
        let Grant { access, process, memory } = Grant::decode(descriptor).map_err(|what| self.refused(what))?;
        let len = memory.len();
        // A process does not open what is its own.
        let memory: Arc<dyn Memory> = match process == std::process::id() {
            true => memory.own().ok_or_else(|| self.refused("no such memory is of this process"))?,
            false => PeerMemory::open(&self.context, &memory)?,
        };
        let mapped = Region::new(Arc::new(Imported { memory, len, writable: access == Access::PeerWrite }));
        Ok(RemoteRegion { link, key: 0, len: len as u64, access, mapped: Some(mapped) })
    }

    fn close(&mut self, link: LinkId) {
        self.inner.close(link);
    }

    fn post(&mut self, link: LinkId, lane: u8, chain: &[Work<'_>]) -> Result<(), PostError> {
        let is_of_device = |remote: &crate::Remote<'_>| remote.region.mapped.as_ref().is_some_and(Region::on_device);
        let reaches_device = |work: &Work<'_>| match &work.op {
            Op::Write { remote, .. } | Op::Read { remote, .. } | Op::FetchAdd { remote, .. } => is_of_device(remote),
            Op::WriteImmediate { remote, .. } => remote.as_ref().is_some_and(is_of_device),
        };
        if chain.iter().any(reaches_device) {
            let provider = self.provider;
            return Err(PostError::Unsupported {
                provider,
                what: "work on a peer's device memory: a stream reads and writes it",
            });
        }
        self.inner.post(link, lane, chain)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError> {
        self.inner.poll(completions)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), TransportError> {
        self.inner.wait(timeout)
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}

/// The descriptor of a region of device memory: magic, access, process, handle.
struct Grant {
    access: Access,
    process: u32,
    memory: ExportedMemory,
}

impl Grant {
    fn encode(&self) -> Descriptor {
        let access = [u8::from(self.access == Access::PeerWrite), 0, 0, 0];
        [&MAGIC[..], &access, &self.process.to_le_bytes(), &self.memory.encode()].concat()
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let fields = bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_first_chunk::<4>());
        let (access, rest) = fields.ok_or("it is cut short")?;
        let (process, memory) = rest.split_first_chunk().ok_or("it is cut short")?;
        let access = match access {
            [0, 0, 0, 0] => Access::PeerRead,
            [1, 0, 0, 0] => Access::PeerWrite,
            _ => return Err("its access is neither reading nor writing".into()),
        };
        let memory = ExportedMemory::decode(memory).map_err(|error| error.to_string())?;
        Ok(Self { access, process: u32::from_le_bytes(*process), memory })
    }
}
