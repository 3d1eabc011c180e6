//! Memory that this provider registers: the process's own, with the most that peers may be granted on it.

use crate::{Access, HostMemory, Memory, Region, TransportError};
use std::ptr::NonNull;

/// See the module.
pub(super) struct Registered {
    pub(super) memory: HostMemory,
    pub(super) access: Access,
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

/// Whether a region may be granted up to `access`. One that another provider registered may, as far as it is writable:
/// here a region is nothing but memory.
pub(super) fn may_grant(region: &Region, access: Access) -> Result<(), TransportError> {
    if access == Access::Local {
        return Err(TransportError::invalid("a grant of nothing: grant a region for reading or for writing"));
    }
    if let Some(own) = region.memory().as_any().downcast_ref::<Registered>()
        && own.access < access
    {
        return Err(TransportError::invalid(format!("{access:?} of a region that was allocated for {:?}", own.access)));
    }
    if access == Access::PeerWrite && !region.writable() {
        return Err(TransportError::invalid("writing to a region that is mapped read-only here"));
    }
    Ok(())
}
