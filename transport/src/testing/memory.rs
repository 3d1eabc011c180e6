//! Memory that is not a provider's own, for tests: of a file that is mapped twice, and of a device.

use crate::{AddressSpace, DmaBuf, Memory, round_to_page};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use std::any::Any;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// A shared file that is mapped twice: what is written through one mapping is read through the other.
pub struct MappedFile {
    /// The memory, and the other view of it.
    mappings: [NonNull<u8>; 2],
    mapped: usize,
    start: usize,
    len: usize,
    writable: bool,
}

// SAFETY: plain memory without thread affinity.
unsafe impl Send for MappedFile {}
// SAFETY: as above; the second mapping is only copied in and out of.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// A file of `len` zeroed bytes.
    pub fn new(len: usize) -> Self {
        Self::map(len, true)
    }

    /// The same; the mapping that is the memory cannot be written.
    pub fn read_only(len: usize) -> Self {
        Self::map(len, false)
    }

    /// The part of the file from byte `start` on as the memory.
    pub fn starting_at(self, start: usize) -> Self {
        let mut part = self;
        (part.start, part.len) = (start, part.len - start);
        part
    }

    fn map(len: usize, writable: bool) -> Self {
        let mapped = round_to_page(len.max(1)).expect("a reasonable length");
        let file = rustix::fs::memfd_create("stepmesh-test", MemfdFlags::CLOEXEC).expect("a shared file");
        rustix::fs::ftruncate(&file, mapped as u64).expect("ftruncate");
        let both = ProtFlags::READ | ProtFlags::WRITE;
        let mappings = [if writable { both } else { ProtFlags::READ }, both].map(|protection| {
            // SAFETY: a fresh mapping at an address of the kernel's choice.
            let base = unsafe { rustix::mm::mmap(ptr::null_mut(), mapped, protection, MapFlags::SHARED, &file, 0) };
            NonNull::new(base.expect("mmap").cast()).expect("not at zero")
        });
        Self { mappings, mapped, start: 0, len, writable }
    }

    /// Reads the memory through the other mapping.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len);
        let mut bytes = vec![0; len];
        // SAFETY: inside the mapping, as was just checked; `bytes` is elsewhere.
        unsafe {
            ptr::copy_nonoverlapping(self.mappings[1].as_ptr().add(self.start + offset), bytes.as_mut_ptr(), len);
        }
        bytes
    }

    /// Writes the memory through the other mapping.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: inside the mapping, which is writable and not referred to by `bytes`.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.mappings[1].as_ptr().add(self.start + offset), bytes.len());
        }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        for mapping in self.mappings {
            // SAFETY: both were mapped by `map`, and nothing refers to them any more.
            let _ = unsafe { rustix::mm::munmap(mapping.as_ptr().cast(), self.mapped) };
        }
    }
}

// SAFETY: the mapping stays until the value is dropped, readable, and writable where it says so.
unsafe impl Memory for MappedFile {
    fn base(&self) -> NonNull<u8> {
        // SAFETY: inside the mapping.
        unsafe { self.mappings[0].add(self.start) }
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

/// What device memory is to the CPU: addresses that may not be touched, here for fear of SIGSEGV.
pub struct DeviceMemory {
    space: Arc<AddressSpace>,
    len: usize,
    dma_buf: Option<OwnedFd>,
}

impl DeviceMemory {
    /// `len` bytes that are not exported.
    pub fn new(len: usize) -> Self {
        Self { space: AddressSpace::reserve(len).expect("addresses"), len, dma_buf: None }
    }

    /// The same, said to be exported as `dma_buf`.
    pub fn exported_as(self, dma_buf: OwnedFd) -> Self {
        Self { dma_buf: Some(dma_buf), ..self }
    }
}

// SAFETY: the addresses stay reserved until the value is dropped, and it says that they may not be touched.
unsafe impl Memory for DeviceMemory {
    fn base(&self) -> NonNull<u8> {
        self.space.base()
    }

    fn len(&self) -> usize {
        self.len
    }

    fn on_device(&self) -> bool {
        true
    }

    fn dma_buf(&self) -> Option<DmaBuf<'_>> {
        self.dma_buf.as_ref().map(|fd| DmaBuf { fd: fd.as_fd(), offset: 0 })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
