//! Memory that the device may reach: registered for this side's own work, and once more for each grant.

use super::context::Context;
use super::library::check_pointer;
use super::sys::*;
use crate::{Access, HostMemory, Memory, Placement, Region, TransportError, page_bytes};
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

/// A registration of memory with the device, at addresses that count from zero; undone when dropped.
pub(super) struct Registration {
    context: Arc<Context>,
    raw: *mut ibv_mr,
}

// SAFETY: the object is only read, and released by a call that may come from any thread.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Registration {
    /// Registers `memory`.
    ///
    /// # Safety
    /// The memory must outlive the registration.
    unsafe fn new(context: &Arc<Context>, memory: &dyn Memory, access: Access) -> Result<Self, TransportError> {
        let (base, len) = (memory.base().as_ptr(), memory.len());
        if !(base as usize).is_multiple_of(page_bytes()) || len == 0 {
            return Err(TransportError::invalid(format!(
                "{len} bytes at {base:p}: only whole, used pages are registered"
            )));
        }
        let own = if memory.writable() { IBV_ACCESS_LOCAL_WRITE } else { 0 };
        let peers = match access {
            Access::Local => 0,
            Access::PeerRead => IBV_ACCESS_REMOTE_READ,
            Access::PeerWrite => IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE,
        };
        let order = if context.options.relaxed_ordering { IBV_ACCESS_RELAXED_ORDERING } else { 0 };
        let flags = own | peers | order;
        // SAFETY: the range is valid memory by `Memory`'s contract, for as long as the registration by this function's.
        let raw = unsafe { context.verbs.ibv_reg_mr_iova2(context.domain, base.cast(), len, 0, flags) };
        let what = || {
            let mut what = format!("registering {len} bytes with {}", context.name);
            if io::Error::last_os_error().raw_os_error() == Some(libc::ENOMEM) {
                what += " (the limit of locked memory? raise it by `ulimit -l unlimited`, or LimitMEMLOCK=infinity in a \
                         systemd unit)";
            }
            what
        };
        Ok(Self { context: context.clone(), raw: check_pointer(raw, what)? })
    }

    /// What this side's work names it by.
    pub(super) fn local_key(&self) -> u32 {
        // SAFETY: the registration exists until it is dropped.
        unsafe { (*self.raw).lkey }
    }

    /// What a peer's work names it by.
    pub(super) fn remote_key(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.raw).rkey }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: released once; no queue pair that the peer could still use it by is left, by the order of `Link`.
        unsafe { self.context.verbs.ibv_dereg_mr(self.raw) };
    }
}

/// Memory of this process that this side's own work may name. Fields drop in this order.
pub(super) struct Registered {
    /// Made at once for memory that peers never see, else when work first names it: most granted regions are only ever
    /// written by the peer, and each registration counts against the limit of locked memory.
    own: OnceLock<Registration>,
    memory: HostMemory,
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
        let memory = HostMemory::allocate(len, placement)?;
        let registered = Self { own: OnceLock::new(), memory, access, context: context.clone() };
        if access == Access::Local && len > 0 {
            registered.local_key()?;
        }
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
        let own = unsafe { Registration::new(&self.context, &self.memory, Access::Local)? };
        Ok(self.own.get_or_init(|| own).local_key())
    }
}

// SAFETY: all is `HostMemory`'s own promise.
unsafe impl Memory for Registered {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// A region that the peer of one link may use: a registration of its own, so that withdrawing it cuts only this peer.
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
                "{region:?} was not allocated by this device, {}",
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
