//! librdmacm, loaded once for the process when an endpoint first connects by it.

use super::sys::RdmaCm;
use crate::TransportError;
use std::sync::OnceLock;

const LIBRARY: &str = "librdmacm.so.1";

/// The library, or what to do about its absence.
pub(super) fn library() -> Result<&'static RdmaCm, TransportError> {
    static LOADED: OnceLock<Result<RdmaCm, String>> = OnceLock::new();
    // SAFETY: librdmacm's initialisers may run at any time, and the bindings were made from its own header.
    let loaded = LOADED.get_or_init(|| unsafe { RdmaCm::new(LIBRARY) }.map_err(|error| error.to_string()));
    loaded.as_ref().map_err(|why| unsupported(&format!("{why}; install rdma-core 34 or later (Debian: librdmacm1)")))
}

/// Connecting this way is not possible here.
pub(super) fn unsupported(hint: &str) -> TransportError {
    let hint = format!("{hint}; or connect by descriptors alone, which needs no connection manager");
    TransportError::Unsupported { what: "the RDMA connection manager".into(), hint }
}
