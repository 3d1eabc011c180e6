//! Memory that can be mapped a second time, so that a simulated peer's mapping is as real as a process's.

use crate::{Access, Memory, Placement, TransportError, round_to_page};
use rustix::mm::{self, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use std::any::Any;
use std::ptr::{self, NonNull};

/// Anonymous shared pages: allocated, or mapped again from such.
pub(super) struct SharedMemory {
    base: NonNull<u8>,
    len: usize,
    mapped: usize,
    access: Access,
    writable: bool,
    placement: Option<Placement>,
}

// SAFETY: plain memory without thread affinity.
unsafe impl Send for SharedMemory {}
// SAFETY: shared access goes through `Region`'s checked calls.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `len` zeroed bytes that may be granted up to `access`, at `placement` if given.
    pub(super) fn allocate(len: usize, access: Access, placement: Option<Placement>) -> Result<Self, TransportError> {
        let mapped = fitting(len, placement.as_ref())?;
        let (hint, flags) = match &placement {
            Some(place) => (place.address().as_ptr(), MapFlags::SHARED | MapFlags::FIXED),
            None => (ptr::null_mut(), MapFlags::SHARED),
        };
        // SAFETY: either the kernel chooses the address, or the placement owns the addresses that are replaced.
        let base = unsafe { mm::mmap_anonymous(hint.cast(), mapped, ProtFlags::READ | ProtFlags::WRITE, flags) }
            .map_err(|errno| TransportError::system(format!("allocating {len} bytes"), errno))?;
        let base = not_null(base)?;
        Ok(Self { base, len, mapped, access, writable: true, placement })
    }

    /// Up to what it may be granted.
    pub(super) fn access(&self) -> Access {
        self.access
    }

    /// Maps the same pages again, at `placement` if given; they live until the last mapping is dropped.
    pub(super) fn map_again(&self, writable: bool, placement: Option<Placement>) -> Result<Self, TransportError> {
        let mapped = fitting(self.len, placement.as_ref())?;
        let old = self.base.as_ptr().cast();
        // An old size of zero asks for a second mapping of shared pages, and leaves the first.
        // SAFETY: `old` is the start of a shared mapping of this size; the new address is the kernel's choice, or
        // owned by the placement.
        let base = unsafe {
            match &placement {
                Some(place) => mm::mremap_fixed(old, 0, mapped, MremapFlags::MAYMOVE, place.address().as_ptr().cast()),
                None => mm::mremap(old, 0, mapped, MremapFlags::MAYMOVE),
            }
        }
        .map_err(|errno| TransportError::system(format!("mapping a peer's region of {} bytes", self.len), errno))?;
        let base = not_null(base)?;
        let again = Self { base, len: self.len, mapped, access: Access::Local, writable, placement };
        if !writable {
            // SAFETY: the fresh mapping belongs to `again`, which nobody refers to yet.
            unsafe { mm::mprotect(base.as_ptr().cast(), mapped, MprotectFlags::READ) }
                .map_err(|errno| TransportError::system("mapping a peer's region read-only", errno))?;
        }
        Ok(again)
    }
}

fn fitting(len: usize, placement: Option<&Placement>) -> Result<usize, TransportError> {
    let mapped = round_to_page(len.max(1))?;
    match placement {
        Some(place) if place.len() < mapped => {
            Err(TransportError::invalid(format!("{len} bytes do not fit a place of {}", place.len())))
        }
        _ => Ok(mapped),
    }
}

fn not_null(base: *mut std::ffi::c_void) -> Result<NonNull<u8>, TransportError> {
    NonNull::new(base.cast()).ok_or_else(|| TransportError::invalid("the kernel mapped address zero"))
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        if self.placement.is_none() {
            // SAFETY: the mapping is this value's own and nothing refers to it any more.
            let _ = unsafe { mm::munmap(self.base.as_ptr().cast(), self.mapped) };
        }
    }
}

// SAFETY: the mapping is readable (and writable unless `writable` says no) for the value's whole life and never moves.
unsafe impl Memory for SharedMemory {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
