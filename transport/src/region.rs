//! Registered memory: what can be sent from, granted to a peer, and mapped from a peer.

use crate::copy::{self, copy_for_peer, copy_from_peer};
use crate::{LinkId, Memory, PostError, Provider, TransportError};
use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

/// What peers may be granted on a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Nothing: a source and target of this side's own work.
    Local,
    /// Reading (and mapping read-only where the provider maps peer memory).
    PeerRead,
    /// Writing and reading.
    PeerWrite,
}

/// Registered memory. Clones share it, and with it the memory: it is deregistered, and then unmapped or given back to
/// its owner, when the last clone drops, so work in flight never refers to memory that is gone.
///
/// A peer may write a granted region at any time; that the bytes are stable while they are looked at is the protocol's
/// promise (a slot belongs to one side at a time), and a peer that breaks it changes values, never memory safety:
/// every bit pattern is a valid byte.
#[derive(Clone)]
pub struct Region {
    memory: Arc<dyn Memory>,
    /// What the memory has said of itself, which stays so: asked once, not with every work that is posted.
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    on_device: bool,
}

// SAFETY: the pointer is the memory's, which may be reached from any thread.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({:p}, {} bytes)", self.base, self.len)
    }
}

impl Region {
    /// Wraps a provider's memory.
    pub fn new(memory: Arc<dyn Memory>) -> Self {
        let (base, len, writable, on_device) = (memory.base(), memory.len(), memory.writable(), memory.on_device());
        Self { memory, base, len, writable, on_device }
    }

    /// The memory behind it.
    pub fn memory(&self) -> &Arc<dyn Memory> {
        &self.memory
    }

    /// Whether both are clones of one region.
    #[inline]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory)
    }

    /// First byte; of device memory, its address on the device.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the bytes are a device's, which the CPU may not touch: [`Region::at`] and all that reads and writes refuse.
    pub fn on_device(&self) -> bool {
        self.on_device
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this process may store to it.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Where the CPU finds `range`, checked.
    pub fn at(&self, range: Range<usize>) -> Result<NonNull<u8>, TransportError> {
        if self.on_device() {
            return Err(TransportError::DeviceMemory);
        }
        if range.start > range.end || range.end > self.len() {
            return Err(TransportError::invalid(format!("{range:?} is outside a region of {} bytes", self.len())));
        }
        // SAFETY: the offset was just checked to lie in the allocation (or one past its end for an empty range).
        Ok(unsafe { self.base().add(range.start) })
    }

    /// [`Region::at`], for those who need not say why not.
    #[inline]
    pub(crate) fn find(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        let is_inside = !self.on_device && offset <= self.len && len <= self.len - offset;
        // SAFETY: the offset was just checked to lie in the allocation, or one past its end.
        is_inside.then(|| unsafe { self.base.add(offset) })
    }

    fn check_writable(&self) -> Result<(), TransportError> {
        if self.writable() { Ok(()) } else { Err(TransportError::invalid("the region is mapped read-only here")) }
    }

    /// Refuses work on a range that is not there, or whose bytes the CPU, which does this provider's copying, may not touch.
    pub(crate) fn check_local(&self, provider: Provider, offset: usize, len: usize) -> Result<(), PostError> {
        if self.on_device() {
            return Err(PostError::Unsupported { provider, what: "work on device memory" });
        }
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(PostError::Invalid(format!("{len} bytes at {offset} of a region of {} bytes", self.len())));
        }
        Ok(())
    }

    /// Copies `out.len()` bytes out, from `offset`.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), TransportError> {
        let source = self.at(offset..offset.saturating_add(out.len()))?;
        // SAFETY: the source range is inside the region, valid by `Memory`'s contract; `out` cannot overlap it, being
        // exclusively borrowed.
        unsafe { copy_from_peer(source.as_ptr(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Has this core take a range that the CPU finds into its cache, to write it soon, and leaves the bytes as they are: what a peer
    /// has read since it was written last would be taken from the peer's cache line by line. For when there is nothing else to do.
    ///
    /// # Safety
    /// Nobody else writes to the range meanwhile.
    pub unsafe fn prepare_write(&self, range: Range<usize>) {
        if let (true, Ok(start)) = (self.writable, self.at(range.clone())) {
            // SAFETY: inside the region, and writable; otherwise by the contract.
            unsafe { copy::prepare_write(start.as_ptr(), range.len()) };
        }
    }

    /// Copies `bytes` in, at `offset`: as [`copy_for_peer`] does.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), TransportError> {
        let target = self.at(offset..offset.saturating_add(bytes.len()))?;
        self.check_writable()?;
        // SAFETY: the target range is inside the region and writable by `Memory`'s contract; `bytes` may only overlap
        // it if the caller holds a slice into the region, which is allowed.
        unsafe { copy_for_peer(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// As [`Region::write`], for who reads them on this core.
    pub(crate) fn write_here(&self, offset: usize, bytes: &[u8]) -> Result<(), TransportError> {
        let target = self.at(offset..offset.saturating_add(bytes.len()))?;
        self.check_writable()?;
        // SAFETY: as above.
        unsafe { ptr::copy(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// The bytes of `range`.
    ///
    /// # Safety
    /// Nobody may store to the range while the slice lives, by the protocol: the caller owns the slot it lies in.
    pub unsafe fn bytes(&self, range: Range<usize>) -> Result<&[u8], TransportError> {
        let base = self.at(range.clone())?;
        // SAFETY: in bounds and valid by `Memory`; unaliased stores are excluded by this function's contract.
        Ok(unsafe { std::slice::from_raw_parts(base.as_ptr(), range.len()) })
    }

    /// The bytes of `range`, to fill.
    ///
    /// # Safety
    /// Nobody else may look at or store to the range while the slice lives: the caller owns the slot it lies in, and
    /// makes no second slice of it.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bytes_mut(&self, range: Range<usize>) -> Result<&mut [u8], TransportError> {
        let base = self.at(range.clone())?;
        self.check_writable()?;
        // SAFETY: in bounds, valid and writable by `Memory`; exclusive by this function's contract.
        Ok(unsafe { std::slice::from_raw_parts_mut(base.as_ptr(), range.len()) })
    }
}

/// A peer's region as this side may use it: the target of writes and the source of reads on one link.
#[derive(Clone, Debug)]
pub struct RemoteRegion {
    /// The link it was granted over.
    pub link: LinkId,
    /// The key that the provider of the peer checks.
    pub key: u64,
    /// Bytes.
    pub len: u64,
    /// What was granted.
    pub access: Access,
    /// The same memory mapped here, where the provider maps peer memory ([`crate::Properties::maps_peer_memory`]):
    /// what is produced in it needs no write, only an immediate.
    pub mapped: Option<Region>,
}

/// A reserved range of addresses in which regions are placed side by side, so that the regions of several peers form
/// one array with a fixed stride.
pub struct AddressSpace {
    base: NonNull<u8>,
    len: usize,
    taken: Mutex<Vec<Range<usize>>>,
}

// SAFETY: the reservation is plain address space without thread affinity; `taken` is behind its own lock.
unsafe impl Send for AddressSpace {}
// SAFETY: as above.
unsafe impl Sync for AddressSpace {}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddressSpace({:p}, {} bytes)", self.base, self.len)
    }
}

impl AddressSpace {
    /// Reserves `len` bytes of address space, rounded up to whole pages. No memory is used until a region is placed.
    pub fn reserve(len: usize) -> Result<Arc<Self>, TransportError> {
        let len = round_to_page(len.max(1))?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len,
                rustix::mm::ProtFlags::empty(),
                rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::NORESERVE,
            )
        }
        .map_err(|errno| TransportError::system(format!("reserving {len} bytes of address space"), errno))?;
        let base =
            NonNull::new(base.cast::<u8>()).ok_or_else(|| TransportError::invalid("the kernel mapped address zero"))?;
        Ok(Arc::new(Self { base, len, taken: Mutex::new(Vec::new()) }))
    }

    /// First byte.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a reservation has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `reserve`; every placement holds an `Arc` of the space, so none is left.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A place for a region in an address space; taken until dropped, when the addresses become inaccessible again.
#[derive(Debug)]
pub struct Placement {
    space: Arc<AddressSpace>,
    range: Range<usize>,
}

impl Placement {
    /// Takes `len` bytes (rounded up to pages) at `offset` (a multiple of the page size).
    pub fn take(space: &Arc<AddressSpace>, offset: usize, len: usize) -> Result<Self, TransportError> {
        let len = round_to_page(len.max(1))?;
        let end = offset.checked_add(len).filter(|&end| end <= space.len && offset.is_multiple_of(page_bytes()));
        let Some(end) = end else {
            return Err(TransportError::invalid(format!(
                "{len} bytes at {offset} do not fit a space of {} bytes in whole pages",
                space.len
            )));
        };
        let mut taken = space.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.iter().any(|range| range.start < end && offset < range.end) {
            return Err(TransportError::PlaceTaken { offset });
        }
        taken.push(offset..end);
        Ok(Self { space: space.clone(), range: offset..end })
    }

    /// Where to map (`MAP_FIXED`).
    pub fn address(&self) -> NonNull<u8> {
        // SAFETY: the range lies inside the reservation.
        unsafe { self.space.base.add(self.range.start) }
    }

    /// Bytes, whole pages.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        // SAFETY: the range belongs to this placement alone; mapping it inaccessible replaces whatever was placed.
        let _ = unsafe {
            rustix::mm::mmap_anonymous(
                self.address().as_ptr().cast(),
                self.range.len(),
                rustix::mm::ProtFlags::empty(),
                rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::NORESERVE | rustix::mm::MapFlags::FIXED,
            )
        };
        let mut taken = self.space.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|range| *range != self.range);
    }
}

/// The system's page size, in bytes.
pub fn page_bytes() -> usize {
    rustix::param::page_size()
}

/// `len` rounded up to whole pages.
pub fn round_to_page(len: usize) -> Result<usize, TransportError> {
    len.checked_next_multiple_of(page_bytes())
        .ok_or_else(|| TransportError::invalid(format!("{len} bytes are more than an address space holds")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostMemory;

    #[test]
    fn regions_placed_side_by_side_form_one_array() {
        let page = page_bytes();
        let space = AddressSpace::reserve(2 * page).unwrap();
        let place = |rank: usize| Placement::take(&space, rank * page, page).unwrap();
        let regions = [0, 1].map(|rank| Region::new(Arc::new(HostMemory::allocate(page, Some(place(rank))).unwrap())));
        regions[1].write(0, b"second").unwrap();
        // SAFETY: both pages are mapped readable and nobody writes them now.
        let array = unsafe { std::slice::from_raw_parts(space.base().as_ptr(), 2 * page) };
        assert_eq!(&array[page..page + 6], b"second");
    }

    #[test]
    fn a_place_is_taken_until_its_region_is_dropped() {
        let page = page_bytes();
        let space = AddressSpace::reserve(page).unwrap();
        let first = HostMemory::allocate(page, Some(Placement::take(&space, 0, page).unwrap())).unwrap();
        assert!(matches!(Placement::take(&space, 0, page), Err(TransportError::PlaceTaken { offset: 0 })));
        drop(first);
        assert!(Placement::take(&space, 0, page).is_ok());
        assert!(Placement::take(&space, page, page).is_err());
    }

    #[test]
    fn preparing_to_write_changes_no_byte_and_touches_nothing_outside() {
        let region = Region::new(Arc::new(HostMemory::allocate(1000, None).unwrap()));
        let bytes: Vec<u8> = (0..1000_u32).map(|i| i as u8).collect();
        region.write(0, &bytes).unwrap();
        for range in [0..1000, 3..900, 0..0, 10..2000, 2000..3000] {
            // SAFETY: nobody else has the region.
            unsafe { region.prepare_write(range) };
        }
        let mut found = vec![0; 1000];
        region.read(0, &mut found).unwrap();
        assert_eq!(found, bytes);
    }

    #[test]
    fn ranges_outside_a_region_are_refused() {
        let region = Region::new(Arc::new(HostMemory::allocate(10, None).unwrap()));
        assert!(region.write(0, &[1; 10]).is_ok());
        assert!(region.write(1, &[1; 10]).is_err());
        assert!(region.read(usize::MAX, &mut [0]).is_err());
    }
}
