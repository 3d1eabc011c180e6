//! Memory that the device may reach: registered for this side's own work, and once more for each grant; each time with
//! every rail that may need it.

use super::context::Context;
use super::registration::Registration;
use crate::memory::check_registrable;
use crate::{Access, DmaBuf, HostMemory, Memory, Placement, Region, TransportError, page_bytes};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

/// What a rail knows of memory.
struct OnRail {
    context: Arc<Context>,
    /// Made at once for memory that peers never see and for the caller's, else when work first names it: most granted
    /// regions are only ever written by the peer, and each registration counts against the limit of locked memory.
    own: OnceLock<Registration>,
}

/// Memory that this side's own work may name. Fields drop in this order.
pub(super) struct Registered {
    rails: Box<[OnRail]>,
    memory: Arc<dyn Memory>,
    access: Access,
}

impl Registered {
    /// Allocates memory for work on these rails, and registers it.
    pub(super) fn allocate(
        rails: &[Arc<Context>],
        len: usize,
        access: Access,
        placement: Option<Placement>,
    ) -> Result<Self, TransportError> {
        let registered = Self::unregistered(rails, Arc::new(HostMemory::allocate(len, placement)?), access);
        if access == Access::Local && len > 0 {
            registered.register()?;
        }
        Ok(registered)
    }

    /// Registers memory of the caller's for work on these rails.
    pub(super) fn adopt(
        rails: &[Arc<Context>],
        memory: Arc<dyn Memory>,
        access: Access,
    ) -> Result<Self, TransportError> {
        check_registrable(&*memory, access)?;
        let registered = Self::unregistered(rails, memory, access);
        registered.register()?;
        Ok(registered)
    }

    fn unregistered(rails: &[Arc<Context>], memory: Arc<dyn Memory>, access: Access) -> Self {
        let rails = rails.iter().map(|context| OnRail { context: context.clone(), own: OnceLock::new() }).collect();
        Self { rails, memory, access }
    }

    fn register(&self) -> Result<(), TransportError> {
        self.rails.iter().try_for_each(|rail| self.local_key(&rail.context).map(|_| ()))
    }

    fn on(&self, context: &Arc<Context>) -> Option<&OnRail> {
        self.rails.iter().find(|rail| Arc::ptr_eq(&rail.context, context))
    }

    /// The region's memory, if this rail is one of its own.
    pub(super) fn of<'a>(region: &'a Region, context: &Arc<Context>) -> Option<&'a Self> {
        let own = region.memory().as_any().downcast_ref::<Self>()?;
        own.on(context).map(|_| own)
    }

    /// What this side's work on a rail names it by.
    pub(super) fn local_key(&self, context: &Arc<Context>) -> Result<u32, TransportError> {
        let rail = self.on(context).ok_or_else(|| TransportError::invalid("a region of another device"))?;
        if let Some(own) = rail.own.get() {
            return Ok(own.local_key());
        }
        // SAFETY: the registration is dropped before the memory is.
        let own = unsafe { Registration::new(context, &*self.memory, Access::Local)? };
        Ok(rail.own.get_or_init(|| own).local_key())
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

    fn gpu(&self) -> Option<u32> {
        self.memory.gpu()
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

/// A region that the peer of one link may use: registrations of its own, so that withdrawing it cuts only this peer.
/// Fields drop in this order.
pub(super) struct Grant {
    /// One for each rail of the link.
    registrations: Box<[Registration]>,
    _region: Region,
}

impl Grant {
    /// Registers a region for a peer, with the link's rails.
    pub(super) fn new<'a>(
        rails: impl Iterator<Item = &'a Arc<Context>>,
        region: &Region,
        access: Access,
    ) -> Result<Self, TransportError> {
        if access == Access::Local {
            return Err(TransportError::invalid("a grant of nothing: grant a region for reading or for writing"));
        }
        let register = |context: &Arc<Context>| {
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
            unsafe { Registration::new(context, &**region.memory(), access) }
        };
        let registrations = rails.map(register).collect::<Result<_, _>>()?;
        Ok(Self { registrations, _region: region.clone() })
    }

    /// What the peer's work names it by on each rail of the link.
    pub(super) fn remote_keys(&self) -> Vec<u32> {
        self.registrations.iter().map(Registration::remote_key).collect()
    }
}
