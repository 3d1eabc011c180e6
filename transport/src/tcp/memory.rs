//! What of the memory of this process peers may be granted.

use crate::memory::Registered;
use crate::{Access, Region, TransportError};

/// Whether a region may be granted up to `access`. One that another provider registered may, as far as it is writable:
/// here a region is nothing but memory.
pub(super) fn may_grant(region: &Region, access: Access) -> Result<(), TransportError> {
    if access == Access::Local {
        return Err(TransportError::invalid("a grant of nothing: grant a region for reading or for writing"));
    }
    if region.on_device() {
        return Err(TransportError::DeviceMemory);
    }
    if let Some(own) = Registered::access(region)
        && own < access
    {
        return Err(TransportError::invalid(format!("{access:?} of a region that was allocated for {own:?}")));
    }
    if access == Access::PeerWrite && !region.writable() {
        return Err(TransportError::invalid("writing to a region that is mapped read-only here"));
    }
    Ok(())
}
