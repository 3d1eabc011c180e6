//! Memory that the device may reach: registered for this side's own work, and once more for each grant.

use super::context::Context;
use super::registration::Registration;
use crate::memory::check_registrable;
use crate::{Access, DmaBuf, HostMemory, Memory, Placement, Region, TransportError, page_bytes};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

/// Memory that this side's own work may name. Fields drop in this order.
pub(super) struct Registered {
    /// Made at once for memory that peers never see and for the caller's, else when work first names it: most granted
    /// regions are only ever written by the peer, and each registration counts against the limit of locked memory.
    own: OnceLock<Registration>,
    memory: Arc<dyn Memory>,
    access: Access,
    context: Arc<Context>,
}

impl Registered {
    /// Allocates and registers.
    pub(super) fn allocate(
        context: &Arc<Context>,
        len: usize,
        access: Access,
        placement: Option<Placement>,
    ) -> Result<Self, TransportError> {
        let memory = Arc::new(HostMemory::allocate(len, placement)?);
        let registered = Self { own: OnceLock::new(), memory, access, context: context.clone() };
        if access == Access::Local && len > 0 {
            registered.local_key()?;
        }
        Ok(registered)
    }

    /// Registers memory of the caller's.
    pub(super) fn adopt(
        context: &Arc<Context>,
        memory: Arc<dyn Memory>,
        access: Access,
    ) -> Result<Self, TransportError> {
        check_registrable(&*memory, access)?;
        let registered = Self { own: OnceLock::new(), memory, access, context: context.clone() };
        registered.local_key()?;
        Ok(registered)
    }

    /// The region's memory, if it is of this device.
    pub(super) fn of<'a>(region: &'a Region, context: &Arc<Context>) -> Option<&'a Self> {
        let own = region.memory().as_any().downcast_ref::<Self>()?;
        Arc::ptr_eq(&own.context, context).then_some(own)
    }

    /// What this side's work names it by.
    pub(super) fn local_key(&self) -> Result<u32, TransportError> {
        if let Some(own) = self.own.get() {
            return Ok(own.local_key());
        }
        // SAFETY: the registration is dropped before the memory is.
        let own = unsafe { Registration::new(&self.context, &*self.memory, Access::Local)? };
        Ok(self.own.get_or_init(|| own).local_key())
    }
}

// SAFETY: all is the memory's own promise.
unsafe impl Memory for Registered {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn writable(&self) -> bool {
        self.memory.writable()
    }

    fn on_device(&self) -> bool {
        self.memory.on_device()
    }

    fn dma_buf(&self) -> Option<DmaBuf<'_>> {
        self.memory.dma_buf()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Refuses on-demand paging that the device lacks, by trying it on a page.
pub(super) fn check_on_demand_paging(context: &Arc<Context>) -> Result<(), TransportError> {
    let page = HostMemory::allocate(page_bytes(), None)?;
    // SAFETY: the registration is dropped at once, before the page.
    unsafe { Registration::new(context, &page, Access::PeerWrite) }.map(drop)
}

/// A region that the peer of one link may use: a registration of its own, so that withdrawing it cuts only this peer.
/// Fields drop in this order.
pub(super) struct Grant {
    registration: Registration,
    _region: Region,
}

impl Grant {
    /// Registers a region for a peer.
    pub(super) fn new(context: &Arc<Context>, region: &Region, access: Access) -> Result<Self, TransportError> {
        if access == Access::Local {
            return Err(TransportError::invalid("a grant of nothing: grant a region for reading or for writing"));
        }
        let Some(own) = Registered::of(region, context) else {
            return Err(TransportError::invalid(format!(
                "{region:?} was neither allocated nor registered by this device, {}",
                context.name
            )));
        };
        if own.access < access {
            let what = format!("{access:?} of a region that was allocated for {:?}", own.access);
            return Err(TransportError::invalid(what));
        }
        // SAFETY: the region's handle is dropped after the registration.
        let registration = unsafe { Registration::new(context, &**region.memory(), access)? };
        Ok(Self { registration, _region: region.clone() })
    }

    /// What the peer's work names it by.
    pub(super) fn remote_key(&self) -> u32 {
        self.registration.remote_key()
    }
}
