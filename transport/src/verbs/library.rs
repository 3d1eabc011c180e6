//! libibverbs, loaded once for the process when it is first needed, and how its failures read.

use super::sys::{Verbs, load};
use crate::TransportError;
use std::io;
use std::sync::OnceLock;

/// The library, or what to do about its absence. It stays loaded: its drivers keep state of their own.
pub(super) fn verbs() -> Result<&'static Verbs, TransportError> {
    static LOADED: OnceLock<Result<Verbs, String>> = OnceLock::new();
    LOADED.get_or_init(load).as_ref().map_err(|why| TransportError::Unsupported {
        what: "RDMA".into(),
        hint: format!("{why}; install rdma-core 32 or later (Debian: libibverbs1 and ibverbs-providers)"),
    })
}

/// Why there is no list of devices.
pub(super) fn no_list(error: io::Error) -> TransportError {
    match error.raw_os_error() {
        // What a kernel without RDMA support answers.
        Some(libc::ENOSYS | libc::ENODEV) => no_devices(&format!("the kernel has no RDMA support ({error})")),
        _ => TransportError::system("listing the RDMA devices", error),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_rdma_has_no_devices() {
        for errno in [libc::ENOSYS, libc::ENODEV] {
            let error = no_list(io::Error::from_raw_os_error(errno));
            assert!(
                matches!(&error, TransportError::Unsupported { hint, .. } if hint.contains("no devices")),
                "{error}"
            );
        }
        let error = no_list(io::Error::from_raw_os_error(libc::EMFILE));
        assert!(matches!(&error, TransportError::System { .. }), "{error}");
    }
}
