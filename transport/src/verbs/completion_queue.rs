//! The completion queue of one endpoint, large enough for all that its queue pairs can complete.

use super::context::Context;
use super::library::{check, check_pointer};
use super::sys::*;
use crate::TransportError;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;

/// Completions that are taken at a time.
const BATCH: usize = 32;
const FIRST_CAPACITY: usize = 4096;

/// See the module.
pub(super) struct CompletionQueue {
    context: Arc<Context>,
    channel: *mut ibv_comp_channel,
    raw: *mut ibv_cq,
    capacity: usize,
    /// Completions that living queue pairs may have in it.
    reserved: usize,
    /// Those of dead queue pairs, until the queue has been seen empty.
    retired: usize,
    /// Taken from the queue by [`CompletionQueue::look`], and how many of them by [`CompletionQueue::next`].
    seen: [ibv_wc; BATCH],
    seen_len: usize,
    taken: usize,
    poll: unsafe extern "C" fn(*mut ibv_cq, i32, *mut ibv_wc) -> i32,
    arm: unsafe extern "C" fn(*mut ibv_cq, i32) -> i32,
}

// SAFETY: libibverbs' objects may be used from any thread; this one is used by one at a time.
unsafe impl Send for CompletionQueue {}

impl CompletionQueue {
    /// An empty queue with its own event channel.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, TransportError> {
        let verbs = context.verbs;
        // SAFETY: an open context's table of functions does not change.
        let operations = unsafe { &(*context.raw).ops };
        let (Some(poll), Some(arm)) = (operations.poll_cq, operations.req_notify_cq) else {
            return Err(TransportError::Unsupported {
                what: format!("polling {}", context.name),
                hint: "its user-space driver is incomplete; update rdma-core".into(),
            });
        };
        // SAFETY: the context is open.
        let channel = unsafe { verbs.ibv_create_comp_channel(context.raw) };
        let channel = check_pointer(channel, || format!("making an event channel on {}", context.name))?;
        let capacity = FIRST_CAPACITY.min(context.limits.completions);
        let mut queue = Self {
            context: context.clone(),
            channel,
            raw: ptr::null_mut(),
            capacity,
            reserved: 0,
            retired: 0,
            seen: [ibv_wc::default(); BATCH],
            seen_len: 0,
            taken: 0,
            poll,
            arm,
        };
        // SAFETY: the context and the channel exist.
        let raw = unsafe { verbs.ibv_create_cq(context.raw, capacity as i32, ptr::null_mut(), channel, 0) };
        queue.raw = check_pointer(raw, || format!("making a completion queue of {capacity} on {}", context.name))?;
        rustix::io::ioctl_fionbio(queue.event_fd(), true)
            .map_err(|errno| TransportError::system("watching a completion queue", errno))?;
        Ok(queue)
    }

    pub(super) fn raw(&self) -> *mut ibv_cq {
        self.raw
    }

    /// What becomes readable when something completes in an armed queue.
    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the channel is.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    /// Makes room for the completions of one more queue pair.
    pub(super) fn reserve(&mut self, completions: usize) -> Result<(), TransportError> {
        let needed = self.reserved + self.retired + completions;
        if needed > self.capacity {
            let most = self.context.limits.completions;
            if needed > most {
                let what = format!(
                    "{needed} completions: a queue of {} holds {most}; use fewer links, lanes or a smaller \
                                    queue depth",
                    self.context.name
                );
                return Err(TransportError::invalid(what));
            }
            let capacity = needed.next_power_of_two().min(most);
            // SAFETY: the queue exists.
            let code = unsafe { self.context.verbs.ibv_resize_cq(self.raw, capacity as i32) };
            check(code, || format!("growing a completion queue to {capacity} on {}", self.context.name))?;
            self.capacity = capacity;
        }
        self.reserved += completions;
        Ok(())
    }

    /// A queue pair is gone; what it completed may still be in the queue.
    pub(super) fn retire(&mut self, completions: usize) {
        self.reserved -= completions;
        self.retired += completions;
    }

    /// The next of the completions that were taken from the queue together.
    #[inline]
    pub(super) fn next(&mut self) -> Option<ibv_wc> {
        let next = self.seen[..self.seen_len].get(self.taken).copied()?;
        self.taken += 1;
        Some(next)
    }

    /// Whether the last look brought as many as can be taken together: there may be more.
    pub(super) fn was_full(&self) -> bool {
        self.seen_len == BATCH
    }

    /// Whether there is something to take.
    #[inline]
    pub(super) fn look(&mut self) -> Result<bool, TransportError> {
        if self.taken == self.seen_len {
            // SAFETY: the queue exists, and `seen` has room for as many completions as are asked for.
            let count = unsafe { (self.poll)(self.raw, BATCH as i32, self.seen.as_mut_ptr()) };
            let Ok(count) = usize::try_from(count) else {
                return Err(TransportError::system(format!("polling {}", self.context.name), rustix::io::Errno::IO));
            };
            (self.seen_len, self.taken) = (count, 0);
            if count == 0 {
                self.retired = 0;
            }
        }
        Ok(self.taken < self.seen_len)
    }

    /// Asks for an event at the next completion. What completed before makes none: look again.
    pub(super) fn arm(&mut self) -> Result<(), TransportError> {
        // SAFETY: the queue exists.
        check(unsafe { (self.arm)(self.raw, 0) }, || format!("arming a completion queue of {}", self.context.name))
    }

    /// Takes the events that have come.
    pub(super) fn calm(&mut self) {
        let (mut queue, mut about) = (ptr::null_mut(), ptr::null_mut());
        let mut events = 0;
        // SAFETY: the channel exists and does not block; it has one queue, this.
        while unsafe { self.context.verbs.ibv_get_cq_event(self.channel, &mut queue, &mut about) } == 0 {
            events += 1;
        }
        if events > 0 {
            // SAFETY: so many events of this queue were taken and not acknowledged before.
            unsafe { self.context.verbs.ibv_ack_cq_events(self.raw, events) };
        }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: each is destroyed once, the queue before its channel; no queue pair uses it any more, by the order of
        // the endpoint's fields.
        unsafe {
            if !self.raw.is_null() {
                self.context.verbs.ibv_destroy_cq(self.raw);
            }
            self.context.verbs.ibv_destroy_comp_channel(self.channel);
        }
    }
}
