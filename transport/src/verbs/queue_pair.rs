//! One reliable-connection queue pair: made, moved through its states, posted to, destroyed.

use super::completion_queue::CompletionQueue;
use super::connection_manager::{Identifier, Offer};
use super::context::{Context, Port};
use super::library::{check, check_pointer, code_error};
use super::sys::*;
use crate::TransportError;
use std::io;
use std::ptr;
use std::sync::Arc;

/// Receives that are posted at a time.
pub(super) const RECEIVE_BATCH: usize = 32;

/// One end of a queue pair as the other needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Half {
    pub(super) number: u32,
    /// The sequence number of its first packet.
    pub(super) first_packet: u32,
}

/// The port of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PeerPort {
    pub(super) lid: u16,
    pub(super) gid: [u8; 16],
    pub(super) mtu: u8,
    pub(super) reads: u8,
}

/// How large a queue pair is to be, and what its peer may do with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) sends: usize,
    pub(super) receives: usize,
    pub(super) inline: usize,
    pub(super) access: u32,
}

/// See the module. The device touches nothing for it any more when it is dropped.
pub(super) struct QueuePair {
    context: Arc<Context>,
    raw: *mut ibv_qp,
    shape: Shape,
    first_packet: u32,
    post_send: PostSend,
    post_receive: PostReceive,
}

type PostSend = unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> i32;
type PostReceive = unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> i32;

// SAFETY: libibverbs' objects may be used from any thread; this one is used by one at a time.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// A queue pair in its initial state, with no receive posted. Its `shape.inline` is what the device takes.
    pub(super) fn new(context: &Arc<Context>, queue: &CompletionQueue, shape: Shape) -> Result<Self, TransportError> {
        // SAFETY: an open context's table of functions does not change.
        let operations = unsafe { &(*context.raw).ops };
        let (Some(post_send), Some(post_receive)) = (operations.post_send, operations.post_recv) else {
            return Err(TransportError::Unsupported {
                what: format!("posting to {}", context.name),
                hint: "its user-space driver is incomplete; update rdma-core".into(),
            });
        };
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|error| TransportError::invalid(format!("no random number: {error}")))?;
        let first_packet = u32::from_le_bytes(random) & 0xFF_FFFF;
        let make = |inline: usize| {
            let mut wanted = ibv_qp_init_attr {
                send_cq: queue.raw(),
                recv_cq: queue.raw(),
                cap: ibv_qp_cap {
                    max_send_wr: shape.sends as u32,
                    max_recv_wr: shape.receives as u32,
                    max_send_sge: 1,
                    max_recv_sge: 1,
                    max_inline_data: inline as u32,
                },
                qp_type: IBV_QPT_RC,
                ..Default::default()
            };
            // SAFETY: the domain and the completion queue exist; the latter outlives its queue pairs by the order of
            // the endpoint's fields.
            let raw = unsafe { context.verbs.ibv_create_qp(context.domain, &mut wanted) };
            (raw, wanted.cap.max_inline_data as usize)
        };
        let (mut raw, mut inline) = make(shape.inline);
        if raw.is_null() && shape.inline > 0 {
            (raw, inline) = make(0);
        }
        let raw = check_pointer(raw, || {
            format!("making a queue pair of {} + {} on {}", shape.sends, shape.receives, context.name)
        })?;
        let shape = Shape { inline: inline.min(shape.inline), ..shape };
        let pair = Self { context: context.clone(), raw, shape, first_packet, post_send, post_receive };
        pair.initialise()?;
        Ok(pair)
    }

    /// What it takes inline, and how many receives it holds.
    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    /// This end.
    pub(super) fn half(&self) -> Half {
        // SAFETY: the queue pair exists until it is dropped.
        Half { number: unsafe { (*self.raw).qp_num }, first_packet: self.first_packet }
    }

    fn modify(&self, mut attributes: ibv_qp_attr, mask: u32) -> Result<(), TransportError> {
        // SAFETY: the queue pair exists; the mask says which attributes are filled in.
        let code = unsafe { self.context.verbs.ibv_modify_qp(self.raw, &mut attributes, mask as i32) };
        check(code, || format!("moving a queue pair on {} to state {}", self.context.name, attributes.qp_state))
    }

    fn initialise(&self) -> Result<(), TransportError> {
        let attributes = ibv_qp_attr {
            qp_state: IBV_QPS_INIT,
            port_num: self.context.port.number,
            qp_access_flags: self.shape.access,
            ..Default::default()
        };
        self.modify(attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)
    }

    /// Connects it to the peer's.
    pub(super) fn connect(&self, peer: &PeerPort, half: Half) -> Result<(), TransportError> {
        let Context { port, options, limits, .. } = &*self.context;
        let Port { is_ethernet, number, gid_index, mtu, .. } = *port;
        let route = ibv_global_route {
            dgid: ibv_gid { raw: peer.gid },
            sgid_index: gid_index,
            hop_limit: 64,
            traffic_class: options.traffic_class,
            ..Default::default()
        };
        let address = ibv_ah_attr {
            grh: route,
            dlid: peer.lid,
            sl: options.service_level,
            is_global: is_ethernet.into(),
            port_num: number,
            ..Default::default()
        };
        let receive = ibv_qp_attr {
            qp_state: IBV_QPS_RTR,
            ah_attr: address,
            path_mtu: mtu.min(peer.mtu.into()),
            dest_qp_num: half.number,
            rq_psn: half.first_packet,
            max_dest_rd_atomic: limits.reads,
            min_rnr_timer: options.not_ready_timer,
            ..Default::default()
        };
        let mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
        self.modify(receive, mask | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER)?;
        let send = ibv_qp_attr {
            qp_state: IBV_QPS_RTS,
            sq_psn: self.first_packet,
            timeout: options.timeout,
            retry_cnt: options.retries,
            rnr_retry: options.not_ready_retries,
            max_rd_atomic: limits.reads.min(peer.reads),
            ..Default::default()
        };
        let mask = IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY;
        self.modify(send, mask | IBV_QP_MAX_QP_RD_ATOMIC)
    }

    /// Connects it as the connection manager has agreed with the peer's. Timers and priorities are this side's own.
    pub(super) fn connect_by(&self, identifier: &Identifier) -> Result<(), TransportError> {
        let Context { port, options, limits, .. } = &*self.context;
        for state in [IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS] {
            let (mut attributes, mask) = identifier.attributes(state)?;
            attributes.qp_access_flags = self.shape.access;
            attributes.path_mtu = attributes.path_mtu.min(port.mtu);
            attributes.max_dest_rd_atomic = attributes.max_dest_rd_atomic.min(limits.reads);
            attributes.max_rd_atomic = attributes.max_rd_atomic.min(limits.reads);
            attributes.min_rnr_timer = options.not_ready_timer;
            attributes.timeout = options.timeout;
            [attributes.retry_cnt, attributes.rnr_retry] = self.retries();
            if port.is_ethernet {
                // On InfiniBand the route has its own.
                attributes.ah_attr.grh.traffic_class = options.traffic_class;
                attributes.ah_attr.sl = options.service_level;
            }
            self.modify(attributes, mask)?;
        }
        Ok(())
    }

    /// What it offers to a peer through the connection manager.
    pub(super) fn offer(&self) -> Offer {
        let reads = self.context.limits.reads;
        Offer { number: self.half().number, answered_reads: reads, reads }
    }

    /// How often it sends again, unacknowledged and when the peer is not ready.
    pub(super) fn retries(&self) -> [u8; 2] {
        [self.context.options.retries, self.context.options.not_ready_retries]
    }

    /// Moves it to the error state: nothing is sent or taken any more, and all that is posted completes as flushed.
    pub(super) fn fail(&self) -> Result<(), TransportError> {
        self.modify(ibv_qp_attr { qp_state: IBV_QPS_ERR, ..Default::default() }, IBV_QP_STATE)
    }

    /// Makes it as good as new, with no receive posted.
    pub(super) fn reset(&self) -> Result<(), TransportError> {
        self.modify(ibv_qp_attr { qp_state: IBV_QPS_RESET, ..Default::default() }, IBV_QP_STATE)?;
        self.initialise()
    }

    /// Posts the list that begins with `first`; on failure, with the first request that was not taken.
    ///
    /// # Safety
    /// The list must be well formed, and the memory that it names registered and alive until the work completes.
    pub(super) unsafe fn post_send(&mut self, first: *mut ibv_send_wr) -> Result<(), (*mut ibv_send_wr, io::Error)> {
        let mut refused = ptr::null_mut();
        // SAFETY: the queue pair exists; the list by this function's contract.
        match unsafe { (self.post_send)(self.raw, first, &mut refused) } {
            0 => Ok(()),
            code => Err((refused, code_error(code))),
        }
    }

    /// Posts `count` receives without a buffer, all known as `id`.
    pub(super) fn post_receives(&mut self, id: u64, count: usize) -> Result<(), TransportError> {
        let mut left = count;
        while left > 0 {
            let batch = left.min(RECEIVE_BATCH);
            let mut requests = [ibv_recv_wr { wr_id: id, ..Default::default() }; RECEIVE_BATCH];
            for index in 1..batch {
                requests[index - 1].next = &raw mut requests[index];
            }
            let mut refused = ptr::null_mut();
            // SAFETY: the queue pair exists, and the list of `batch` requests is read before the call returns.
            let code = unsafe { (self.post_receive)(self.raw, requests.as_mut_ptr(), &mut refused) };
            check(code, || format!("posting {count} receives on {}", self.context.name))?;
            left -= batch;
        }
        Ok(())
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: destroyed once; what it was posted outlives it by the order of the fields of those who hold it.
        unsafe { self.context.verbs.ibv_destroy_qp(self.raw) };
    }
}
