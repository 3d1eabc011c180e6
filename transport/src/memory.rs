//! What regions are made of: memory that stays where it is, a provider's or the caller's own.

use crate::{Access, Placement, Region, TransportError, page_bytes, round_to_page};
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// Bytes that stay at one address until the last handle drops.
///
/// # Safety
/// `base..base + len` must not move, and must stay what it is, for as long as the value lives: nothing may free, unmap or
/// shorten it. Unless [`Memory::on_device`] says that it is a device's, it must be valid for reads (and for writes, unless
/// [`Memory::writable`] says no) from any thread. A [`Memory::dma_buf`] must hold these very bytes.
#[allow(clippy::len_without_is_empty)]
pub unsafe trait Memory: Send + Sync {
    /// First byte; of device memory, its address on the device.
    fn base(&self) -> NonNull<u8>;
    /// Bytes.
    fn len(&self) -> usize;
    /// Whether this process may store to it.
    fn writable(&self) -> bool {
        true
    }
    /// Whether it is a device's, such as a GPU's: the CPU never touches the bytes.
    fn on_device(&self) -> bool {
        self.gpu().is_some()
    }
    /// The GPU that it is on, as the CUDA driver counts those that are visible, if it is a GPU's.
    fn gpu(&self) -> Option<u32> {
        None
    }
    /// What device memory is exported as, if it is: how a network device that knows dma-buf reaches it. It is asked for at
    /// each registration, and the descriptor is needed no longer than that.
    fn dma_buf(&self) -> Option<DmaBuf<'_>> {
        None
    }
    /// The provider's own view of it, for its downcast.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// Where a memory begins in a dma-buf.
#[derive(Clone, Copy, Debug)]
pub struct DmaBuf<'a> {
    /// The dma-buf.
    pub fd: BorrowedFd<'a>,
    /// Bytes from its start, whole pages.
    pub offset: u64,
}

/// Refuses memory of a caller's that no provider takes: what [`crate::Device::register`] promises for all of them.
pub(crate) fn check_registrable(memory: &dyn Memory, access: Access) -> Result<(), TransportError> {
    let (base, len) = (memory.base().as_ptr() as usize, memory.len());
    if len == 0 {
        return Err(TransportError::invalid("registering no bytes at all"));
    }
    if !base.is_multiple_of(page_bytes()) || base.checked_add(len).is_none() {
        let what =
            format!("registering {len} bytes at {base:#x}: memory begins at a page, a multiple of {}", page_bytes());
        return Err(TransportError::invalid(what));
    }
    if access == Access::PeerWrite && !memory.writable() {
        return Err(TransportError::invalid("registering memory for peers to write that this process may not write"));
    }
    Ok(())
}

/// Memory with the most that peers may be granted on it: all that a provider knows of a region whose CPU does the copying.
pub(crate) struct Registered {
    pub(crate) memory: Arc<dyn Memory>,
    pub(crate) access: Access,
}

impl Registered {
    /// Takes up memory of a caller's.
    pub(crate) fn adopt(memory: Arc<dyn Memory>, access: Access) -> Result<Region, TransportError> {
        check_registrable(&*memory, access)?;
        if memory.on_device() {
            return Err(TransportError::DeviceMemory);
        }
        Ok(Region::new(Arc::new(Self { memory, access })))
    }

    /// What may be granted on a region, if it is one of this kind.
    pub(crate) fn access(region: &Region) -> Option<Access> {
        region.memory().as_any().downcast_ref::<Self>().map(|own| own.access)
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

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Anonymous, zeroed memory of this process: what providers that do not share memory register.
pub struct HostMemory {
    base: NonNull<u8>,
    len: usize,
    mapped: usize,
    placement: Option<Placement>,
}

// SAFETY: plain memory without thread affinity.
unsafe impl Send for HostMemory {}
// SAFETY: shared access goes through `Region`'s checked calls.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Maps `len` zeroed bytes, at `placement` if given.
    pub fn allocate(len: usize, placement: Option<Placement>) -> Result<Self, TransportError> {
        use rustix::mm::{MapFlags, ProtFlags};
        let mapped = round_to_page(len.max(1))?;
        if let Some(place) = &placement
            && place.len() < mapped
        {
            return Err(TransportError::invalid(format!("{len} bytes do not fit a place of {}", place.len())));
        }
        let (hint, flags) = match &placement {
            Some(place) => (place.address().as_ptr(), MapFlags::PRIVATE | MapFlags::FIXED),
            None => (ptr::null_mut(), MapFlags::PRIVATE),
        };
        // SAFETY: either the kernel chooses the address, or the placement owns the addresses that are replaced.
        let base =
            unsafe { rustix::mm::mmap_anonymous(hint.cast(), mapped, ProtFlags::READ | ProtFlags::WRITE, flags) }
                .map_err(|errno| TransportError::system(format!("allocating {len} bytes"), errno))?;
        let base =
            NonNull::new(base.cast::<u8>()).ok_or_else(|| TransportError::invalid("the kernel mapped address zero"))?;
        // SAFETY: the mapping that was just made.
        unsafe { prefer_huge_pages(base, mapped) };
        Ok(Self { base, len, mapped, placement })
    }
}

/// Bytes of a huge page, on the machines that this is for.
const HUGE_PAGE: usize = 2 << 20;

/// Asks for huge pages where a mapping could hold one: fewer misses of the TLB when it is copied. Where the system has none
/// to give, nothing changes.
///
/// # Safety
/// `base..base + len` is a mapping of the caller's, in whole pages.
pub(crate) unsafe fn prefer_huge_pages(base: NonNull<u8>, len: usize) {
    if len >= HUGE_PAGE {
        // SAFETY: the caller's contract; the advice changes no byte.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, rustix::mm::Advice::LinuxHugepage) };
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if self.placement.is_none() {
            // SAFETY: the mapping was made by `allocate` and nothing refers to it any more.
            let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.mapped) };
        }
    }
}

// SAFETY: the mapping is readable and writable for the value's whole life and never moves.
unsafe impl Memory for HostMemory {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::DeviceMemory;

    #[test]
    fn the_cpu_touches_no_device_memory() {
        let region = Region::new(Arc::new(DeviceMemory::new(4096)));
        let refused = |result: Result<(), TransportError>| assert!(matches!(result, Err(TransportError::DeviceMemory)));
        refused(region.read(0, &mut [0]));
        refused(region.write(0, &[1]));
        refused(region.at(0..1).map(|_| ()));
        // SAFETY: refused before anything is touched.
        refused(unsafe { region.bytes(0..1).map(|_| ()) });
        // SAFETY: as above.
        refused(unsafe { region.bytes_mut(0..1).map(|_| ()) });
    }
}
