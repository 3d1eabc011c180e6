//! Sealed shared memory: memfds that can neither shrink nor grow, so that no mapping of them can fault.

use crate::memory::prefer_huge_pages;
use crate::{Access, Memory, Placement, Region, TransportError, page_bytes, round_to_page};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::any::Any;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

/// What every memfd of this provider carries: its size is fixed for ever.
const FIXED_SIZE: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Makes a memfd of `len` zeroed bytes (whole pages) with all its memory taken; the caller seals it.
pub(super) fn create(name: &str, len: usize) -> Result<OwnedFd, TransportError> {
    let fd = open(name, len)?;
    take_all(&fd, len)?;
    Ok(fd)
}

/// Makes a memfd of `len` zeroed bytes that takes no memory yet.
fn open(name: &str, len: usize) -> Result<OwnedFd, TransportError> {
    let failed = |errno| TransportError::system(format!("making {len} bytes of shared memory ({name})"), errno);
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(failed)?;
    rustix::fs::ftruncate(&fd, len as u64).map_err(failed)?;
    Ok(fd)
}

/// Takes the memory of all pages that have none yet, so that none can be wanting later.
fn take_all(fd: &OwnedFd, len: usize) -> Result<(), TransportError> {
    rustix::fs::fallocate(fd, FallocateFlags::empty(), 0, len as u64)
        .map_err(|errno| TransportError::system(format!("taking {len} bytes of shared memory"), errno))
}

/// Fixes the size of a memfd, and with `read_only` lets no one map it writable from now on.
pub(super) fn seal(fd: &OwnedFd, read_only: bool) -> Result<(), TransportError> {
    let seals = if read_only { FIXED_SIZE | SealFlags::FUTURE_WRITE } else { FIXED_SIZE };
    rustix::fs::fcntl_add_seals(fd, seals).map_err(|errno| TransportError::system("sealing shared memory", errno))
}

/// Whether a received descriptor is a memfd of exactly `len` bytes that stays so.
pub(super) fn check(fd: &OwnedFd, len: usize) -> Result<(), String> {
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| "the descriptor is no sealed memory".to_owned())?;
    if !seals.contains(FIXED_SIZE) {
        return Err("the memory is not sealed against shrinking and growing".into());
    }
    let size = rustix::fs::fstat(fd).map_err(|errno| format!("looking at the memory: {errno}"))?.st_size;
    if u64::try_from(size) != Ok(len as u64) {
        return Err(format!("the memory has {size} bytes instead of {len}"));
    }
    Ok(())
}

/// Whole pages of a memfd, mapped and faulted in.
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    placement: Option<Placement>,
}

// SAFETY: plain memory without thread affinity.
unsafe impl Send for Mapping {}
// SAFETY: access goes through atomics or `Region`'s checked calls.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes (whole pages) of a memfd of that size, at `placement` if given.
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        len: usize,
        writable: bool,
        placement: Option<Placement>,
    ) -> Result<Self, TransportError> {
        if let Some(place) = &placement
            && place.len() < len
        {
            return Err(TransportError::invalid(format!("{len} bytes do not fit a place of {}", place.len())));
        }
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let (hint, flags) = match &placement {
            Some(place) => (place.address().as_ptr(), MapFlags::SHARED | MapFlags::FIXED),
            None => (ptr::null_mut(), MapFlags::SHARED),
        };
        // SAFETY: either the kernel chooses the address, or the placement owns the addresses that are replaced.
        let base = unsafe { rustix::mm::mmap(hint.cast(), len, protection, flags, fd, 0) }
            .map_err(|errno| TransportError::system(format!("mapping {len} bytes of shared memory"), errno))?;
        let base =
            NonNull::new(base.cast::<u8>()).ok_or_else(|| TransportError::invalid("the kernel mapped address zero"))?;
        let faults = if writable { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
        // SAFETY: the mapping that was just made; neither advice changes a byte.
        unsafe {
            prefer_huge_pages(base, len);
            // Best effort: what is not faulted in now is when it is first touched.
            let _ = rustix::mm::madvise(base.as_ptr().cast(), len, faults);
        }
        Ok(Self { base, len, placement })
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.placement.is_none() {
            // SAFETY: the mapping was made by `new` and nothing refers to it any more.
            let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

/// The memory of a region that peers may map, or that a peer has granted.
pub(super) struct SharedMemory {
    mapping: Mapping,
    len: usize,
    writable: bool,
    /// What this side may grant, and by which descriptor; nothing for a peer's memory.
    owned: Option<(OwnedFd, Access)>,
}

impl SharedMemory {
    /// Memory of this side that may be granted up to `access`.
    pub(super) fn allocate(len: usize, access: Access, placement: Option<Placement>) -> Result<Self, TransportError> {
        let mapped = round_to_page(len.max(1))?;
        // Mapped before it takes memory, because huge pages are asked for by the mapping.
        let fd = open("stepmesh-region", mapped)?;
        let mapping = Mapping::new(fd.as_fd(), mapped, true, placement)?;
        take_all(&fd, mapped)?;
        seal(&fd, access != Access::PeerWrite)?;
        Ok(Self { mapping, len, writable: true, owned: Some((fd, access)) })
    }

    /// A peer's memory, whose descriptor has passed [`check`].
    pub(super) fn import(
        fd: &OwnedFd,
        len: usize,
        access: Access,
        placement: Option<Placement>,
    ) -> Result<Self, TransportError> {
        let writable = access == Access::PeerWrite;
        let mapping = Mapping::new(fd.as_fd(), round_to_page(len.max(1))?, writable, placement)?;
        Ok(Self { mapping, len, writable, owned: None })
    }

    /// A descriptor with which a peer can map the memory with no more than `access`.
    pub(super) fn share(&self, access: Access) -> Result<OwnedFd, TransportError> {
        let failed = |errno| TransportError::system("sharing a region", errno);
        match &self.owned {
            Some((_, allowed)) if access == Access::Local || access > *allowed => Err(TransportError::invalid(
                format!("the region was allocated for {allowed:?} and cannot be granted for {access:?}"),
            )),
            // A writable memfd is passed on read-only by opening it again.
            Some((fd, Access::PeerWrite)) if access == Access::PeerRead => {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)
            }
            Some((fd, _)) => rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(failed),
            None => Err(TransportError::invalid("a peer's region cannot be granted on")),
        }
    }
}

// SAFETY: the mapping is readable, and writable where it says so, for the value's whole life; it never moves, and its
// file cannot shrink.
unsafe impl Memory for SharedMemory {
    fn base(&self) -> NonNull<u8> {
        self.mapping.base()
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

/// Touches every page of fresh private memory, so that no page fault is left for the steady state.
pub(super) fn prefault(region: &Region) {
    for offset in (0..region.len()).step_by(page_bytes()) {
        // SAFETY: inside the region, which is writable and not yet known to anybody else.
        unsafe { region.base().add(offset).write_volatile(0) };
    }
}
