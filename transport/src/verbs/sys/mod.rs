//! libibverbs as this provider sees it: `bindings`, checked in and loaded at run time; or with the feature `ibverbs-sys`
//! that crate's bindings, linked, in the same shape, with both found to agree on every layout that is used.

mod bindings;

#[cfg(not(feature = "ibverbs-sys"))]
mod loaded;
#[cfg(not(feature = "ibverbs-sys"))]
pub(super) use loaded::*;

#[cfg(feature = "ibverbs-sys")]
mod agreement;
#[cfg(feature = "ibverbs-sys")]
mod linked;
#[cfg(feature = "ibverbs-sys")]
pub(super) use linked::*;

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
