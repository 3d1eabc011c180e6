//! One identifier of the connection manager: what a listener, and each connection of a queue pair, is to it. The queue
//! pair itself is made and moved elsewhere; from here come addresses, routes, and the attributes that both ends agreed on.

use super::address::raw;
use super::channel::Channel;
use super::sys::*;
use crate::TransportError;
use crate::verbs::context::Context;
use crate::verbs::library::{check, verbs};
use crate::verbs::sys::ibv_qp_attr;
use std::ffi::{CStr, c_void};
use std::io;
use std::net::SocketAddr;
use std::ptr;
use std::time::Duration;

/// Attributes that the kernel uses itself and names to the user all the same.
const KERNEL_ATTRIBUTES: u32 = 0xE0_0000;

/// What one end offers the other for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    /// The number of its queue pair.
    pub(crate) number: u32,
    /// Reads that it answers at a time, and that it has under way.
    pub(crate) answered_reads: u8,
    pub(crate) reads: u8,
}

/// See the module. Destroyed when dropped; a request that was not answered is refused by that, and a peer that is
/// connected is told.
pub(crate) struct Identifier {
    library: &'static RdmaCm,
    raw: *mut rdma_cm_id,
}

// SAFETY: librdmacm's objects may be used from any thread; its calls lock what they share.
unsafe impl Send for Identifier {}

impl Identifier {
    /// An identifier whose events come to `channel`, which must outlive it, and are `about` this.
    pub(super) fn new(channel: &Channel, about: u64) -> Result<Self, TransportError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is open, and `raw` a place for the identifier; the library does not look at `about`.
        let code = unsafe {
            channel.library.rdma_create_id(channel.raw, &mut raw, about as usize as *mut c_void, RDMA_PS_TCP)
        };
        check(code, || "making an identifier of the connection manager".into())?;
        Ok(Self { library: channel.library, raw })
    }

    /// Takes over one that came with a request.
    ///
    /// # Safety
    /// It must be alive, and nobody else's.
    pub(super) unsafe fn take_over(library: &'static RdmaCm, raw: *mut rdma_cm_id) -> Self {
        Self { library, raw }
    }

    /// What its events will be about.
    pub(super) fn set_about(&mut self, about: u64) {
        // SAFETY: it exists until it is dropped, and this field is the user's.
        unsafe { (*self.raw).context = about as usize as *mut c_void };
    }

    /// Gives it an address of this host.
    pub(super) fn bind(&self, address: SocketAddr) -> Result<(), TransportError> {
        let mut address_of = raw(address);
        // SAFETY: the identifier exists, and the address is one of its family.
        check(unsafe { self.library.rdma_bind_addr(self.raw, (&raw mut address_of).cast()) }, || {
            format!("binding {address}")
        })
    }

    /// Whether its address is that of `context`'s port.
    pub(super) fn is_on(&self, context: &Context) -> bool {
        let Ok(verbs) = verbs() else { return false };
        // SAFETY: the identifier exists; once it is bound to a device, that is open and has a name, a C string.
        unsafe {
            let (device, port) = ((*self.raw).verbs, (*self.raw).port_num);
            !device.is_null()
                && port == context.port.number
                && CStr::from_ptr(verbs.ibv_get_device_name((*device).device)).to_bytes() == context.name.as_bytes()
        }
    }

    /// Takes requests from now on; the port that it does so at.
    pub(super) fn listen(&self, backlog: i32) -> Result<u16, TransportError> {
        // SAFETY: the identifier exists and is bound.
        check(unsafe { self.library.rdma_listen(self.raw, backlog) }, || "listening for connections".into())?;
        // SAFETY: as above.
        Ok(u16::from_be(unsafe { self.library.rdma_get_src_port(self.raw) }))
    }

    /// Begins to find the peer's address, from this one of a rail.
    pub(super) fn resolve_address(
        &self,
        from: SocketAddr,
        to: SocketAddr,
        timeout: Duration,
    ) -> Result<(), TransportError> {
        let (mut source, mut destination) = (raw(from), raw(to));
        let (source, destination) = ((&raw mut source).cast(), (&raw mut destination).cast());
        // SAFETY: the identifier exists, and the addresses are each of its family.
        let code = unsafe { self.library.rdma_resolve_addr(self.raw, source, destination, milliseconds(timeout)) };
        check(code, || format!("resolving {to} from {from}"))
    }

    /// Begins to find the route to the resolved address.
    pub(super) fn resolve_route(&self, timeout: Duration) -> Result<(), TransportError> {
        // SAFETY: the identifier exists.
        let code = unsafe { self.library.rdma_resolve_route(self.raw, milliseconds(timeout)) };
        check(code, || "finding the route to the peer".into())
    }

    /// The GIDs between which packets travel: this end's and the peer's.
    pub(super) fn gids(&self) -> [[u8; 16]; 2] {
        // SAFETY: the identifier exists; every bit pattern of the unions is valid as bytes.
        unsafe {
            let addresses = &(*self.raw).route.addr.addr.ibaddr;
            [addresses.sgid.raw, addresses.dgid.raw]
        }
    }

    /// Asks the peer.
    pub(super) fn connect(&self, offer: Offer, retries: [u8; 2], message: &[u8]) -> Result<(), TransportError> {
        let mut parameters = parameters(offer, retries, message);
        // SAFETY: the identifier exists, and the message outlives the call.
        check(unsafe { self.library.rdma_connect(self.raw, &mut parameters) }, || "asking the peer to connect".into())
    }

    /// Answers the peer's request; the queue pair can already send.
    pub(super) fn accept(&self, offer: Offer, retries: [u8; 2], message: &[u8]) -> Result<(), TransportError> {
        let mut parameters = parameters(offer, retries, message);
        // SAFETY: as above.
        check(unsafe { self.library.rdma_accept(self.raw, &mut parameters) }, || "accepting the peer".into())
    }

    /// Tells the peer, who has answered, that the queue pair can send.
    pub(super) fn establish(&self) -> Result<(), TransportError> {
        // SAFETY: the identifier exists.
        check(unsafe { self.library.rdma_establish(self.raw) }, || "confirming the connection".into())
    }

    /// Refuses the peer's request, or its answer.
    pub(super) fn reject(self) {
        // SAFETY: the identifier exists. If the peer is gone, there is nobody to tell.
        unsafe { self.library.rdma_reject(self.raw, ptr::null(), 0) };
    }

    /// What a queue pair's attributes have to be in `state`, and which of them it takes there.
    pub(crate) fn attributes(&self, state: u32) -> Result<(ibv_qp_attr, u32), TransportError> {
        let mut attributes = ibv_qp_attr { qp_state: state, ..Default::default() };
        let mut mask = 0;
        // SAFETY: the identifier exists, and both are places for the answer.
        let code = unsafe { self.library.rdma_init_qp_attr(self.raw, &mut attributes, &mut mask) };
        check(code, || format!("asking for a queue pair's attributes in state {state}"))?;
        Ok((attributes, mask as u32 & !KERNEL_ATTRIBUTES))
    }
}

impl Drop for Identifier {
    fn drop(&mut self) {
        // SAFETY: destroyed once; its events were acknowledged when they were taken.
        unsafe { self.library.rdma_destroy_id(self.raw) };
    }
}

fn parameters(offer: Offer, retries: [u8; 2], message: &[u8]) -> rdma_conn_param {
    let [retry_count, rnr_retry_count] = retries;
    rdma_conn_param {
        private_data: message.as_ptr().cast(),
        private_data_len: message.len() as u8,
        responder_resources: offer.answered_reads,
        initiator_depth: offer.reads,
        flow_control: 1,
        retry_count,
        rnr_retry_count,
        srq: 0,
        qp_num: offer.number,
    }
}

fn milliseconds(timeout: Duration) -> i32 {
    i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX).max(1)
}

/// The error of an event: the library gives negative error numbers.
pub(super) fn event_error(status: i32) -> io::Error {
    io::Error::from_raw_os_error(status.saturating_neg())
}
