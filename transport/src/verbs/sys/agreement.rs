//! That the checked-in bindings and those of `ibverbs-sys`, made from another version's headers, mean the same: each size,
//! alignment, offset and number that this provider relies on. A disagreement does not compile.

use super::{bindings, linked};
use std::mem::{align_of, offset_of, size_of};

/// Structures of one size, with these fields at the same places.
macro_rules! layouts {
    ($($name:ident { $($field:ident)* })*) => {
        $(const _: () = {
            assert!(size_of::<bindings::$name>() == size_of::<ibverbs_sys::$name>(), stringify!($name));
            assert!(align_of::<bindings::$name>() == align_of::<ibverbs_sys::$name>(), stringify!($name));
            offsets!($name { $($field)* });
        };)*
    };
}

macro_rules! offsets {
    ($name:ident { $($field:ident)* }) => {
        $(assert!(
            offset_of!(bindings::$name, $field) == offset_of!(ibverbs_sys::$name, $field),
            concat!(stringify!($name), "::", stringify!($field))
        );)*
    };
}

macro_rules! numbers {
    ($($name:ident)*) => { $(const _: () = assert!(bindings::$name == linked::$name, stringify!($name));)* };
}

layouts! {
    ibv_ah_attr { grh dlid sl src_path_bits static_rate is_global port_num }
    ibv_async_event { element event_type }
    ibv_comp_channel { context fd }
    ibv_context { device ops cmd_fd async_fd num_comp_vectors }
    ibv_context_ops { poll_cq req_notify_cq post_send post_recv }
    ibv_cq { context channel }
    ibv_device_attr { max_qp_wr max_cqe max_qp_rd_atom max_qp_init_rd_atom atomic_cap phys_port_cnt }
    ibv_gid { raw }
    ibv_gid_entry { gid gid_index port_num gid_type ndev_ifindex }
    ibv_global_route { dgid flow_label sgid_index hop_limit traffic_class }
    ibv_mr { context pd addr length handle lkey rkey }
    ibv_pd { context handle }
    ibv_qp { context qp_num }
    ibv_qp_attr {
        qp_state path_mtu rq_psn sq_psn dest_qp_num qp_access_flags ah_attr pkey_index max_rd_atomic max_dest_rd_atomic
        min_rnr_timer port_num timeout retry_cnt rnr_retry
    }
    ibv_qp_cap { max_send_wr max_recv_wr max_send_sge max_recv_sge max_inline_data }
    ibv_qp_init_attr { qp_context send_cq recv_cq srq cap qp_type sq_sig_all }
    ibv_recv_wr { wr_id next sg_list num_sge }
    ibv_send_wr { wr_id next sg_list num_sge opcode send_flags __bindgen_anon_1 wr qp_type __bindgen_anon_2 }
    ibv_send_wr__bindgen_ty_1 { imm_data }
    ibv_send_wr__bindgen_ty_2 { rdma atomic }
    ibv_send_wr__bindgen_ty_2__bindgen_ty_1 { remote_addr rkey }
    ibv_send_wr__bindgen_ty_2__bindgen_ty_2 { remote_addr compare_add swap rkey }
    ibv_sge { addr length lkey }
}

// Grows at its end; the call that fills it knows the first part only.
const _: () = {
    assert!(size_of::<bindings::_compat_ibv_port_attr>() == size_of::<ibverbs_sys::_compat_ibv_port_attr>());
    offsets!(ibv_port_attr { state active_mtu gid_tbl_len max_msg_sz lid link_layer });
};

// The fields of the crate's own completion are private: the test below looks at them.
const _: () = {
    assert!(size_of::<bindings::ibv_wc>() == size_of::<ibverbs_sys::ibv_wc>());
    assert!(align_of::<bindings::ibv_wc>() == align_of::<ibverbs_sys::ibv_wc>());
    assert!(offset_of!(bindings::ibv_wc, __bindgen_anon_1) == offset_of!(ibverbs_sys::ibv_wc, imm_data));
};

numbers! {
    IBV_ACCESS_LOCAL_WRITE IBV_ACCESS_REMOTE_WRITE IBV_ACCESS_REMOTE_READ IBV_ACCESS_REMOTE_ATOMIC IBV_ACCESS_ON_DEMAND
    IBV_ACCESS_RELAXED_ORDERING IBV_ATOMIC_NONE IBV_EVENT_DEVICE_FATAL IBV_EVENT_PORT_ERR IBV_GID_TYPE_ROCE_V2
    IBV_MTU_256 IBV_MTU_512 IBV_MTU_1024 IBV_MTU_2048 IBV_MTU_4096 IBV_PORT_ACTIVE IBV_QPS_RESET IBV_QPS_INIT
    IBV_QPS_RTR IBV_QPS_RTS IBV_QPS_ERR IBV_QPT_RC IBV_QP_STATE IBV_QP_ACCESS_FLAGS IBV_QP_PKEY_INDEX IBV_QP_PORT
    IBV_QP_AV IBV_QP_PATH_MTU IBV_QP_TIMEOUT IBV_QP_RETRY_CNT IBV_QP_RNR_RETRY IBV_QP_RQ_PSN IBV_QP_MAX_QP_RD_ATOMIC
    IBV_QP_MIN_RNR_TIMER IBV_QP_SQ_PSN IBV_QP_MAX_DEST_RD_ATOMIC IBV_QP_DEST_QPN IBV_SEND_SIGNALED IBV_SEND_INLINE
    IBV_WC_SUCCESS IBV_WC_WR_FLUSH_ERR IBV_WC_REM_INV_REQ_ERR IBV_WC_REM_ACCESS_ERR IBV_WC_REM_OP_ERR
    IBV_WC_RETRY_EXC_ERR IBV_WC_RNR_RETRY_EXC_ERR IBV_WR_RDMA_WRITE IBV_WR_RDMA_WRITE_WITH_IMM IBV_WR_SEND_WITH_IMM
    IBV_WR_RDMA_READ IBV_WR_ATOMIC_FETCH_AND_ADD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completion_reads_the_same_through_both_bindings() {
        let mut ours = bindings::ibv_wc { wr_id: 0x0123_4567_89AB_CDEF, ..Default::default() };
        ours.__bindgen_anon_1.imm_data = 0xDEAD_BEEF;
        for status in [bindings::IBV_WC_SUCCESS, bindings::IBV_WC_WR_FLUSH_ERR, bindings::IBV_WC_REM_ACCESS_ERR] {
            ours.status = status;
            // SAFETY: both are plain numbers of one size, as was found above.
            let theirs: ibverbs_sys::ibv_wc = unsafe { std::mem::transmute(ours) };
            let read = linked::completed(&theirs);
            assert_eq!((read.id, read.status, read.immediate), (ours.wr_id, status, 0xDEAD_BEEF));
        }
    }
}
