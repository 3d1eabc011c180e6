//! The one place where payload bytes move.

use std::ptr;

/// Copies `len` bytes. How (`rep movsb`, non-temporal stores with a closing fence, plain) is to be chosen here, by size.
///
/// Bytes that were produced in place (`source == target`) are not touched.
///
/// # Safety
/// `source..source + len` must be readable and `target..target + len` writable; they may overlap.
pub(super) unsafe fn copy(source: *const u8, target: *mut u8, len: usize) {
    if !ptr::eq(source, target) {
        // SAFETY: this function's contract.
        unsafe { ptr::copy(source, target, len) };
    }
}
