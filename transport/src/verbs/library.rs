//! libibverbs, loaded once for the process when it is first needed, and how its failures read.

use super::sys::Verbs;
use crate::TransportError;
use std::io;
use std::sync::OnceLock;

const LIBRARY: &str = "libibverbs.so.1";

/// The library, or what to do about its absence. It stays loaded: its drivers keep state of their own.
pub(super) fn verbs() -> Result<&'static Verbs, TransportError> {
    static LOADED: OnceLock<Result<Verbs, String>> = OnceLock::new();
    // SAFETY: libibverbs' initialisers may run at any time, and the bindings were made from its own header.
    let loaded = LOADED.get_or_init(|| unsafe { Verbs::new(LIBRARY) }.map_err(|error| error.to_string()));
    loaded.as_ref().map_err(|why| TransportError::Unsupported {
        what: "RDMA".into(),
        hint: format!("{why}; install rdma-core 34 or later (Debian: libibverbs1 and ibverbs-providers)"),
    })
}

/// There is no device to open.
pub(super) fn no_devices(why: &str) -> TransportError {
    TransportError::Unsupported {
        what: "RDMA".into(),
        hint: format!(
            "no devices: {why}; load the driver of the adapter, or for Soft-RoCE `modprobe rdma_rxe` and `rdma link add rxe0 \
             type rxe netdev eth0`"
        ),
    }
}

/// The result of a call that returns zero, an error number, or -1 with `errno`.
pub(super) fn check(code: i32, what: impl FnOnce() -> String) -> Result<(), TransportError> {
    match code {
        0 => Ok(()),
        errno => Err(TransportError::system(what(), code_error(errno))),
    }
}

/// The result of a call that returns a pointer, or null with `errno`.
pub(super) fn check_pointer<T>(pointer: *mut T, what: impl FnOnce() -> String) -> Result<*mut T, TransportError> {
    if pointer.is_null() { Err(TransportError::system(what(), io::Error::last_os_error())) } else { Ok(pointer) }
}

/// What a non-zero return value means.
pub(super) fn code_error(code: i32) -> io::Error {
    if code > 0 { io::Error::from_raw_os_error(code) } else { io::Error::last_os_error() }
}
