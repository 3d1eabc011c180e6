//! The channel by which the connection manager tells an endpoint what has happened.

use super::identifier::{Identifier, Offer};
use super::library::{library, unsupported};
use super::sys::*;
use crate::TransportError;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::os::fd::BorrowedFd;
use std::ptr;

/// The longest message that a request carries; an answer's may be longer, and is not here.
const MESSAGE_BYTES: usize = 56;

/// Something that has happened.
pub(super) struct Event {
    pub(super) kind: rdma_cm_event_type,
    pub(super) status: i32,
    /// What its identifier is about; of a request, what the listener is.
    pub(super) about: u64,
    /// What a request came with.
    pub(super) request: Option<Identifier>,
    /// Of a request or an answer: what the peer offers, as this end may use it, and its message.
    pub(super) offer: Offer,
    pub(super) message: [u8; MESSAGE_BYTES],
}

/// See the module.
pub(super) struct Channel {
    pub(super) library: &'static RdmaCm,
    pub(super) raw: *mut rdma_event_channel,
}

// SAFETY: librdmacm's objects may be used from any thread; this one is used by one at a time.
unsafe impl Send for Channel {}

impl Channel {
    pub(super) fn new() -> Result<Self, TransportError> {
        let library = library()?;
        // SAFETY: a call without arguments.
        let raw = unsafe { library.rdma_create_event_channel() };
        if raw.is_null() {
            let why = std::io::Error::last_os_error();
            return Err(unsupported(&format!("the kernel does not offer it ({why}); try `modprobe rdma_ucm`")));
        }
        let channel = Self { library, raw };
        rustix::io::ioctl_fionbio(channel.event_fd(), true)
            .map_err(|errno| TransportError::system("watching the connection manager", errno))?;
        Ok(channel)
    }

    /// What is readable while there are events.
    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the channel is.
        unsafe { BorrowedFd::borrow_raw((*self.raw).fd) }
    }

    /// Whether there is an event; without an allocation of the library's.
    pub(super) fn is_readable(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut channel = [PollFd::from_borrowed_fd(self.event_fd(), PollFlags::IN)];
        rustix::event::poll(&mut channel, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Takes an event, if there is one.
    pub(super) fn take(&self) -> Option<Event> {
        if !self.is_readable() {
            return None;
        }
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is open and does not block.
        if unsafe { self.library.rdma_get_cm_event(self.raw, &mut raw) } != 0 {
            return None;
        }
        // SAFETY: an event that was just taken, with a living identifier, and of a request with one that is new.
        let event = unsafe {
            let &rdma_cm_event { id, event: kind, status, param, .. } = &*raw;
            let is_request = kind == RDMA_CM_EVENT_CONNECT_REQUEST;
            let mut message = [0; MESSAGE_BYTES];
            let mut offer = Offer { number: 0, answered_reads: 0, reads: 0 };
            if is_request || kind == RDMA_CM_EVENT_CONNECT_RESPONSE {
                let conn = param.conn;
                offer = Offer {
                    number: conn.qp_num,
                    answered_reads: conn.responder_resources,
                    reads: conn.initiator_depth,
                };
                if !conn.private_data.is_null() {
                    let len = usize::from(conn.private_data_len).min(MESSAGE_BYTES);
                    ptr::copy_nonoverlapping(conn.private_data.cast(), message.as_mut_ptr(), len);
                }
            }
            let request = is_request.then(|| Identifier::take_over(self.library, id));
            Event { kind, status, about: (*id).context as usize as u64, request, offer, message }
        };
        // SAFETY: the event was just taken, everything in it copied; each is acknowledged once.
        unsafe { self.library.rdma_ack_cm_event(raw) };
        Some(event)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: destroyed once, after all its identifiers, by the order of the fields of those who hold them.
        unsafe { self.library.rdma_destroy_event_channel(self.raw) };
    }
}
