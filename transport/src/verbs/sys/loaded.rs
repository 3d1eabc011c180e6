//! The checked-in bindings, and the library loaded under them.

use super::{Completed, RegisterDmaBuf};
use std::sync::OnceLock;

pub(in super::super) use super::bindings::*;

const LIBRARY: &str = "libibverbs.so.1";

/// Loads the library, for good: its drivers keep state of their own.
pub(in super::super) fn load() -> Result<Verbs, String> {
    // SAFETY: libibverbs' initialisers may run at any time, and the bindings were made from its own header.
    unsafe { Verbs::new(LIBRARY) }.map_err(|error| error.to_string())
}

/// A call that rdma-core has from version 34 on only.
pub(in super::super) fn register_dma_buf() -> Option<RegisterDmaBuf> {
    static FOUND: OnceLock<Option<RegisterDmaBuf>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: as in `load`; the library is loaded already.
        let library = unsafe { libloading::Library::new(LIBRARY) }.ok()?;
        // SAFETY: a function of that name has this signature, and stays where it is: the library is never unloaded, as
        // `load` keeps it.
        unsafe { library.get::<RegisterDmaBuf>(b"ibv_reg_dmabuf_mr\0") }.ok().map(|call| *call)
    })
}

/// What a completion says.
pub(in super::super) fn completed(completion: &ibv_wc) -> Completed {
    // SAFETY: every bit pattern is a valid number.
    let immediate = unsafe { completion.__bindgen_anon_1.imm_data };
    Completed { id: completion.wr_id, status: completion.status, immediate }
}
