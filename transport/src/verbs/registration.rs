//! A registration of memory with the device: which rights it gives, and how the device reaches memory that is not host's.

use super::context::Context;
use super::refusal::{Machine, Refusal, Way, explain};
use super::sys::*;
use crate::memory::check_registrable;
use crate::{Access, DmaBuf, Memory, TransportError, page_bytes};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// A registration, at addresses that count from zero; undone when dropped.
pub(super) struct Registration {
    context: Arc<Context>,
    raw: NonNull<ibv_mr>,
}

// SAFETY: the object is only read, and released by a call that may come from any thread.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Registration {
    /// Registers `memory`.
    ///
    /// # Safety
    /// The memory must outlive the registration.
    pub(super) unsafe fn new(
        context: &Arc<Context>,
        memory: &dyn Memory,
        access: Access,
    ) -> Result<Self, TransportError> {
        check_registrable(memory, access)?;
        let flags = rights(memory, access, context.limits.atomics)
            | if context.options.relaxed_ordering { IBV_ACCESS_RELAXED_ORDERING } else { 0 };
        let made = if memory.on_device() {
            let dma_buf = memory.dma_buf();
            dma_buf.map_or(Ok(()), |dma_buf| check_dma_buf(dma_buf, memory.len()))?;
            let by_dma_buf = |dma_buf: DmaBuf<'_>| by_dma_buf(context, dma_buf, memory.len(), flags);
            reach(dma_buf, by_dma_buf, || by_address(context, memory, flags))
        } else {
            let on_demand = context.options.on_demand_paging;
            let flags = flags | if on_demand { IBV_ACCESS_ON_DEMAND } else { 0 };
            let way = match (on_demand, memory.writable()) {
                (true, _) => Way::OnDemand,
                (false, true) => Way::Locked,
                (false, false) => Way::ReadOnly,
            };
            by_address(context, memory, flags).map_err(|source| vec![Refusal { way, source }])
        };
        match made {
            Ok(raw) => Ok(Self { context: context.clone(), raw }),
            Err(refusals) => Err(explain(&context.name, memory.len(), refusals, &Machine::look())),
        }
    }

    /// What this side's work names it by.
    pub(super) fn local_key(&self) -> u32 {
        // SAFETY: the registration exists until it is dropped.
        unsafe { self.raw.as_ref().lkey }
    }

    /// What a peer's work names it by.
    pub(super) fn remote_key(&self) -> u32 {
        // SAFETY: as above.
        unsafe { self.raw.as_ref().rkey }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: released once; no queue pair that the peer could still use it by is left, by the order of `Link`.
        unsafe { self.context.verbs.ibv_dereg_mr(self.raw.as_ptr()) };
    }
}

/// What this side and its peers may do with memory.
fn rights(memory: &dyn Memory, access: Access, atomics: bool) -> u32 {
    let own = if memory.writable() { IBV_ACCESS_LOCAL_WRITE } else { 0 };
    let peers = match access {
        Access::Local => 0,
        Access::PeerRead => IBV_ACCESS_REMOTE_READ,
        Access::PeerWrite if atomics => IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC,
        Access::PeerWrite => IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE,
    };
    own | peers
}

/// Refuses a place in a dma-buf that cannot be.
fn check_dma_buf(DmaBuf { fd, offset }: DmaBuf<'_>, len: usize) -> Result<(), TransportError> {
    if !offset.is_multiple_of(page_bytes() as u64) {
        let what = format!("memory at byte {offset} of a dma-buf: it begins at a page, a multiple of {}", page_bytes());
        return Err(TransportError::invalid(what));
    }
    // A dma-buf tells its size so; what does not, is for the kernel to refuse.
    match rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0)) {
        Ok(size) if offset.checked_add(len as u64).is_none_or(|end| end > size) => {
            Err(TransportError::invalid(format!("{len} bytes at byte {offset} of a dma-buf of {size} bytes")))
        }
        _ => Ok(()),
    }
}

/// Tries device memory's ways: its dma-buf if it has one, and then peer memory.
fn reach<T>(
    dma_buf: Option<DmaBuf<'_>>,
    by_dma_buf: impl FnOnce(DmaBuf<'_>) -> io::Result<T>,
    by_peer_memory: impl FnOnce() -> io::Result<T>,
) -> Result<T, Vec<Refusal>> {
    let mut refusals = Vec::new();
    if let Some(dma_buf) = dma_buf {
        match by_dma_buf(dma_buf) {
            Ok(made) => return Ok(made),
            Err(source) => refusals.push(Refusal { way: Way::DmaBuf, source }),
        }
    }
    by_peer_memory().map_err(|source| {
        refusals.push(Refusal { way: Way::PeerMemory, source });
        refusals
    })
}

fn by_address(context: &Context, memory: &dyn Memory, flags: u32) -> io::Result<NonNull<ibv_mr>> {
    let base = memory.base().as_ptr().cast();
    // SAFETY: the domain exists; the range is the memory's own, and stays for as long as the registration by the contract
    // of `Registration::new`. A device's address that nothing knows is refused.
    let raw = unsafe { context.verbs.ibv_reg_mr_iova2(context.domain, base, memory.len(), 0, flags) };
    NonNull::new(raw).ok_or_else(io::Error::last_os_error)
}

fn by_dma_buf(context: &Context, dma_buf: DmaBuf<'_>, len: usize, flags: u32) -> io::Result<NonNull<ibv_mr>> {
    let missing = "libibverbs has no ibv_reg_dmabuf_mr";
    let register = register_dma_buf().ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, missing))?;
    // SAFETY: the domain exists; the dma-buf is open during the call, and its bytes are the memory's own, which stays for as
    // long as the registration by the contract of `Registration::new`.
    let raw = unsafe { register(context.domain, dma_buf.offset, len, 0, dma_buf.fd.as_raw_fd(), flags as i32) };
    NonNull::new(raw).ok_or_else(io::Error::last_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostMemory;
    use std::os::fd::AsFd;

    fn refused(errno: i32) -> io::Result<&'static str> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn device_memory_is_reached_by_its_dma_buf_and_else_as_peer_memory() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let dma_buf = Some(DmaBuf { fd: file.as_fd(), offset: 4096 });
        let reached = reach(dma_buf, |dma_buf| Ok(dma_buf.offset), || unreachable!("the dma-buf was taken"));
        assert_eq!(reached.unwrap(), 4096);
        let reached = reach(dma_buf, |_| refused(libc::EOPNOTSUPP), || Ok("peer memory"));
        assert_eq!(reached.unwrap(), "peer memory");
        let reached = reach(None, |_| unreachable!("there is none"), || Ok("peer memory"));
        assert_eq!(reached.unwrap(), "peer memory");
        let refusals = reach(dma_buf, |_| refused(libc::EOPNOTSUPP), || refused(libc::EFAULT)).unwrap_err();
        let ways: Vec<_> = refusals.iter().map(|refusal| (refusal.way, refusal.source.raw_os_error())).collect();
        assert_eq!(ways, [(Way::DmaBuf, Some(libc::EOPNOTSUPP)), (Way::PeerMemory, Some(libc::EFAULT))]);
    }

    #[test]
    fn a_place_in_a_dma_buf_is_whole_pages_inside_it() {
        let file = rustix::fs::memfd_create("stepmesh-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 3 * page_bytes() as u64).unwrap();
        let check = |offset, len| check_dma_buf(DmaBuf { fd: file.as_fd(), offset }, len);
        assert!(check(page_bytes() as u64, 2 * page_bytes()).is_ok());
        assert!(check(page_bytes() as u64, 2 * page_bytes() + 1).is_err());
        assert!(check(1, 10).is_err());
        assert!(check(u64::MAX - (page_bytes() as u64 - 1), page_bytes() + 1).is_err());
    }

    #[test]
    fn peers_get_the_rights_that_are_granted_and_no_more() {
        let memory = HostMemory::allocate(10, None).unwrap();
        assert_eq!(rights(&memory, Access::Local, true), IBV_ACCESS_LOCAL_WRITE);
        assert_eq!(rights(&memory, Access::PeerRead, true), IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ);
        let writing = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
        assert_eq!(rights(&memory, Access::PeerWrite, false), writing);
        assert_eq!(rights(&memory, Access::PeerWrite, true), writing | IBV_ACCESS_REMOTE_ATOMIC);
    }
}
