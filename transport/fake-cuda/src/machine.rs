//! The machine that the double pretends to be: its memory, what it says of itself, what it is told to fail.

use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUresult};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// What is added to a host address to make a device address: beyond what processors reach.
pub const BIAS: u64 = 1 << 56;
/// Whether it is: not where kernels run, which are the processor's code there.
static IS_BIASED: AtomicBool = AtomicBool::new(true);
/// All of the device's memory.
pub(crate) const MEMORY: usize = 1 << 30;
/// What allocations are made of.
const GRANULE: usize = 2 << 20;

/// Where bytes live.
pub(crate) enum Kind {
    Device(OwnedFd),
    /// Of another process.
    Opened,
    /// Pinned by the driver.
    Host,
    /// The caller's own.
    Registered,
}

pub(crate) struct Allocation {
    pub(crate) len: usize,
    pub(crate) kind: Kind,
}

struct State {
    version: i32,
    attributes: HashMap<i32, i32>,
    failures: HashMap<String, (CUresult, u32)>,
    /// By host address.
    memory: BTreeMap<usize, Allocation>,
}

/// The machine.
pub(crate) struct Machine(Mutex<State>);

pub(crate) fn get() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let attributes = [
            (Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS, 1),
            (Attribute::CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES, 0),
            (Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING, 200),
            (Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, 1),
            (Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9),
            (Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0),
        ];
        Machine(Mutex::new(State {
            version: 12_080,
            attributes: attributes.into_iter().map(|(attribute, value)| (attribute as i32, value)).collect(),
            failures: HashMap::new(),
            memory: BTreeMap::new(),
        }))
    })
}

/// From now on device addresses are host addresses. Before anything is allocated.
pub fn let_the_processor_reach() {
    IS_BIASED.store(false, Ordering::Relaxed);
}

pub(crate) fn bias() -> u64 {
    if IS_BIASED.load(Ordering::Relaxed) { BIAS } else { 0 }
}

impl Machine {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn fail(&self, name: &str, error: CUresult, times: u32) {
        self.lock().failures.insert(name.into(), (error, times));
    }

    /// What the entry point of that name is told to fail with.
    pub(crate) fn failure(&self, name: &str) -> Option<CUresult> {
        let mut state = self.lock();
        let (error, times) = state.failures.get_mut(name).filter(|(_, times)| *times > 0)?;
        *times -= 1;
        Some(*error)
    }

    pub(crate) fn version(&self) -> i32 {
        self.lock().version
    }

    pub(crate) fn set_version(&self, version: i32) {
        self.lock().version = version;
    }

    pub(crate) fn attribute(&self, attribute: i32) -> i32 {
        self.lock().attributes.get(&attribute).copied().unwrap_or(0)
    }

    pub(crate) fn set_attribute(&self, attribute: i32, value: i32) {
        self.lock().attributes.insert(attribute, value);
    }

    pub(crate) fn allocated(&self) -> usize {
        let state = self.lock();
        let device = state.memory.values().filter(|allocation| matches!(allocation.kind, Kind::Device(_)));
        device.map(|allocation| allocation.len).sum()
    }

    /// Device memory; its host address.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<usize, CUresult> {
        let len = bytes.checked_next_multiple_of(GRANULE).ok_or(CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
        if bytes == 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        if len > MEMORY - self.allocated() {
            return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        }
        // SAFETY: a fresh descriptor of nobody else's.
        let raw = unsafe { libc::memfd_create(c"fake-cuda".as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(CUresult::CUDA_ERROR_OPERATING_SYSTEM);
        }
        // SAFETY: the descriptor that was just made.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: as above.
        if unsafe { libc::ftruncate(raw, len as libc::off_t) } != 0 {
            return Err(CUresult::CUDA_ERROR_OPERATING_SYSTEM);
        }
        let address = map(raw, len)?;
        self.lock().memory.insert(address, Allocation { len, kind: Kind::Device(fd) });
        Ok(address)
    }

    /// Memory that the caller has, or that was mapped for it.
    pub(crate) fn keep(&self, address: usize, len: usize, kind: Kind) -> Result<(), CUresult> {
        let mut state = self.lock();
        let before = state.memory.range(..address + len).next_back();
        if before.is_some_and(|(start, allocation)| start + allocation.len > address) {
            return Err(CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        }
        state.memory.insert(address, Allocation { len, kind });
        Ok(())
    }

    /// Takes memory of a kind away.
    pub(crate) fn release(&self, address: usize, is: impl Fn(&Kind) -> bool) -> Result<(), CUresult> {
        let mut state = self.lock();
        let found = state.memory.get(&address).is_some_and(|allocation| is(&allocation.kind));
        if !found {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        if let Some(allocation) = state.memory.remove(&address)
            && !matches!(allocation.kind, Kind::Registered)
        {
            // SAFETY: the mapping was made for this allocation, and the driver's contract is that nobody uses it any more.
            unsafe { libc::munmap(address as *mut libc::c_void, allocation.len) };
        }
        Ok(())
    }

    /// The allocation around a host address: where it begins, and what `look` makes of it.
    pub(crate) fn find<T>(&self, address: usize, look: impl FnOnce(usize, &Allocation) -> T) -> Option<T> {
        let state = self.lock();
        let (start, allocation) = state.memory.range(..=address).next_back()?;
        (address < start + allocation.len).then(|| look(*start, allocation))
    }

    /// Where the host finds `len` bytes at what may be a device address, if they are of memory that is known, or the
    /// caller's own.
    pub(crate) fn reach(&self, address: u64, len: usize) -> Result<*mut u8, CUresult> {
        let Some(host) = address.checked_sub(bias()) else { return Ok(address as *mut u8) };
        match self.find(host as usize, |start, allocation| host as usize + len <= start + allocation.len) {
            Some(true) => Ok(host as *mut u8),
            None if bias() == 0 => Ok(host as *mut u8),
            _ => Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS),
        }
    }
}

/// Maps a file whole; its address, a multiple of the granule.
pub(crate) fn map(fd: i32, len: usize) -> Result<usize, CUresult> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh range of addresses, which nobody uses.
    let space = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len + GRANULE,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if space == libc::MAP_FAILED {
        return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    }
    let address = (space as usize).next_multiple_of(GRANULE);
    // SAFETY: inside the range that was just reserved.
    let mapped =
        unsafe { libc::mmap(address as *mut libc::c_void, len, protection, libc::MAP_SHARED | libc::MAP_FIXED, fd, 0) };
    if mapped == libc::MAP_FAILED { Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY) } else { Ok(address) }
}

/// The descriptor of device memory, for another process.
pub(crate) fn descriptor(kind: &Kind) -> Option<i32> {
    match kind {
        Kind::Device(fd) => Some(fd.as_raw_fd()),
        _ => None,
    }
}
