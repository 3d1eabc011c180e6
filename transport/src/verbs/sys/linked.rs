//! The bindings of the crate `ibverbs-sys`, to which the program is linked, in the shape of the checked-in ones.

#![allow(non_camel_case_types)]

use super::{Completed, RegisterDmaBuf};
use std::ffi::{c_char, c_int, c_void};

pub(in super::super) use ibverbs_sys::{
    _compat_ibv_port_attr, IBV_ATOMIC_NONE, IBV_EVENT_DEVICE_FATAL, IBV_EVENT_PORT_ERR, IBV_GID_TYPE_ROCE_V2,
    IBV_MTU_256, IBV_MTU_512, IBV_MTU_1024, IBV_MTU_2048, IBV_MTU_4096, ibv_ah_attr, ibv_async_event, ibv_comp_channel,
    ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_gid, ibv_gid_entry, ibv_global_route, ibv_mr, ibv_mtu,
    ibv_pd, ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_recv_wr, ibv_send_wr,
    ibv_send_wr__bindgen_ty_1, ibv_send_wr__bindgen_ty_2, ibv_send_wr__bindgen_ty_2__bindgen_ty_1,
    ibv_send_wr__bindgen_ty_2__bindgen_ty_2, ibv_sge, ibv_wc,
};

#[cfg(test)]
pub(in super::super) use ibverbs_sys::IBV_GID_TYPE_ROCE_V1;

pub(in super::super) type ibv_send_flags = u32;
pub(in super::super) type ibv_wc_status = ibverbs_sys::ibv_wc_status::Type;
pub(in super::super) type ibv_wr_opcode = ibverbs_sys::ibv_wr_opcode::Type;

/// Constants of an enumeration that is a module (`in`) or a type (`of`) there.
macro_rules! constants {
    ($($kind:ident $home:ident: $($name:ident)*;)*) => {
        $($(pub(in super::super) const $name: u32 = constants!(@ $kind $home $name);)*)*
    };
    (@ in $home:ident $name:ident) => { ibverbs_sys::$home::$name };
    (@ of $home:ident $name:ident) => { ibverbs_sys::$home::$name.0 };
}

constants! {
    of ibv_access_flags: IBV_ACCESS_LOCAL_WRITE IBV_ACCESS_REMOTE_WRITE IBV_ACCESS_REMOTE_READ IBV_ACCESS_REMOTE_ATOMIC
        IBV_ACCESS_ON_DEMAND IBV_ACCESS_RELAXED_ORDERING;
    of ibv_qp_attr_mask: IBV_QP_STATE IBV_QP_ACCESS_FLAGS IBV_QP_PKEY_INDEX IBV_QP_PORT IBV_QP_AV IBV_QP_PATH_MTU
        IBV_QP_TIMEOUT IBV_QP_RETRY_CNT IBV_QP_RNR_RETRY IBV_QP_RQ_PSN IBV_QP_MAX_QP_RD_ATOMIC IBV_QP_MIN_RNR_TIMER
        IBV_QP_SQ_PSN IBV_QP_MAX_DEST_RD_ATOMIC IBV_QP_DEST_QPN;
    of ibv_send_flags: IBV_SEND_SIGNALED IBV_SEND_INLINE;
    in ibv_port_state: IBV_PORT_ACTIVE;
    in ibv_qp_state: IBV_QPS_RESET IBV_QPS_INIT IBV_QPS_RTR IBV_QPS_RTS IBV_QPS_ERR;
    in ibv_qp_type: IBV_QPT_RC;
    in ibv_wc_status: IBV_WC_SUCCESS IBV_WC_WR_FLUSH_ERR IBV_WC_REM_INV_REQ_ERR IBV_WC_REM_ACCESS_ERR IBV_WC_REM_OP_ERR
        IBV_WC_RETRY_EXC_ERR IBV_WC_RNR_RETRY_EXC_ERR;
    in ibv_wr_opcode: IBV_WR_RDMA_WRITE IBV_WR_RDMA_WRITE_WITH_IMM IBV_WR_SEND_WITH_IMM IBV_WR_RDMA_READ
        IBV_WR_ATOMIC_FETCH_AND_ADD;
}

/// The library, which is there: the program would not have started without it.
pub(in super::super) struct Verbs;

macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        impl Verbs {
            $(
                pub(in super::super) unsafe fn $name(&self, $($argument: $type),*) $(-> $result)? {
                    // SAFETY: the caller's contract is the function's own.
                    unsafe { ibverbs_sys::$name($($argument),*) }
                }
            )*
        }
    };
}

functions! {
    fn ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device;
    fn ibv_free_device_list(list: *mut *mut ibv_device);
    fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
    fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
    fn ibv_close_device(context: *mut ibv_context) -> c_int;
    fn ibv_get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
    fn ibv_ack_async_event(event: *mut ibv_async_event);
    fn ibv_query_device(context: *mut ibv_context, attributes: *mut ibv_device_attr) -> c_int;
    fn ibv_query_port(context: *mut ibv_context, port: u8, attributes: *mut _compat_ibv_port_attr) -> c_int;
    fn _ibv_query_gid_ex(
        context: *mut ibv_context, port: u32, index: u32, entry: *mut ibv_gid_entry, flags: u32, size: usize
    ) -> c_int;
    fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
    fn ibv_dealloc_pd(domain: *mut ibv_pd) -> c_int;
    fn ibv_reg_mr_iova2(domain: *mut ibv_pd, base: *mut c_void, len: usize, first: u64, access: u32) -> *mut ibv_mr;
    fn ibv_dereg_mr(registration: *mut ibv_mr) -> c_int;
    fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
    fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
    fn ibv_create_cq(
        context: *mut ibv_context, capacity: c_int, about: *mut c_void, channel: *mut ibv_comp_channel, vector: c_int
    ) -> *mut ibv_cq;
    fn ibv_resize_cq(queue: *mut ibv_cq, capacity: c_int) -> c_int;
    fn ibv_destroy_cq(queue: *mut ibv_cq) -> c_int;
    fn ibv_get_cq_event(channel: *mut ibv_comp_channel, queue: *mut *mut ibv_cq, about: *mut *mut c_void) -> c_int;
    fn ibv_ack_cq_events(queue: *mut ibv_cq, count: u32);
    fn ibv_create_qp(domain: *mut ibv_pd, attributes: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    fn ibv_modify_qp(pair: *mut ibv_qp, attributes: *mut ibv_qp_attr, mask: c_int) -> c_int;
    fn ibv_destroy_qp(pair: *mut ibv_qp) -> c_int;
}

/// Nothing is left to load.
pub(in super::super) fn load() -> Result<Verbs, String> {
    Ok(Verbs)
}

/// A call that the header of `ibverbs-sys` has.
pub(in super::super) fn register_dma_buf() -> Option<RegisterDmaBuf> {
    Some(ibverbs_sys::ibv_reg_dmabuf_mr)
}

/// What a completion says.
pub(in super::super) fn completed(completion: &ibv_wc) -> Completed {
    let status = completion.error().map_or(IBV_WC_SUCCESS, |(status, _)| status);
    Completed { id: completion.wr_id(), status, immediate: completion.imm_data }
}
