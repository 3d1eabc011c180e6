//! libibverbs as this provider sees it: bindings, checked in, and the library that is loaded under them.

mod bindings;
mod loaded;

pub(super) use loaded::*;

/// `ibv_reg_dmabuf_mr`: protection domain, offset, length, first address, dma-buf, access.
pub(super) type RegisterDmaBuf = unsafe extern "C" fn(*mut ibv_pd, u64, usize, u64, i32, i32) -> *mut ibv_mr;

/// What a completion says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completed {
    pub(super) id: u64,
    pub(super) status: ibv_wc_status,
    /// In the byte order of the network; of meaning where an immediate has come only.
    pub(super) immediate: u32,
}
