//! Over shm a tensor that was produced in its slot is pushed, and answered, without a look at it: one row costs what the
//! largest transfer costs. Shown by taking all access to its pages away meanwhile. Alone in its process, which a touch
//! would kill.

#![allow(clippy::unwrap_used)]

use rustix::mm::{MprotectFlags, mprotect};
use std::ptr::NonNull;
use std::sync::Arc;
use stepmesh_mesh::control::LocalScheduler;
use stepmesh_mesh::scheduler::SchedulerOptions;
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, PartSpec, Policy, Request, SlotLayout, TicketStatus};
use stepmesh_proto::Part;
use stepmesh_transport::{Clock, DeviceOptions, Provider, page_bytes};

const ROW_BYTES: u32 = 7168;
const ROWS: u32 = 256;

/// The whole pages of a part.
struct Pages(NonNull<u8>, usize);

impl Pages {
    fn of(part: &mut [u8]) -> Self {
        let skip = part.as_ptr().align_offset(page_bytes());
        let len = (part.len() - skip) / page_bytes() * page_bytes();
        Self(NonNull::new(part[skip..].as_mut_ptr()).unwrap(), len)
    }

    fn allow(&self, access: MprotectFlags) {
        // SAFETY: pages of a slot, to which this test holds no reference meanwhile.
        unsafe { mprotect(self.0.as_ptr().cast(), self.1, access) }.unwrap();
    }

    /// What `f` gives, which would have died of a look at the pages.
    fn unseen<R>(self, f: impl FnOnce() -> R) -> R {
        self.allow(MprotectFlags::empty());
        let result = f();
        self.allow(MprotectFlags::READ | MprotectFlags::WRITE);
        result
    }
}

#[test]
fn tensors_that_were_produced_in_place_are_pushed_and_answered_unseen() {
    let scheduler = LocalScheduler::new(SchedulerOptions::new(1, 1)).unwrap();
    let specs = vec![PartSpec { row_bytes: ROW_BYTES, max_rows: ROWS }];
    let layout = SlotLayout::new(1, specs.clone(), specs).unwrap();
    let device = stepmesh_transport::open(Provider::Shm, &DeviceOptions::default()).unwrap();
    let parts = || {
        let endpoint = device.endpoint().unwrap();
        let control = Box::new(scheduler.session(endpoint.waker()));
        (MemberOptions::new(layout.clone(), "echo"), Arc::clone(&device), endpoint, control, Clock::system())
    };
    let (options, of, endpoint, control, clock) = parts();
    let mut attention = AttentionMesh::with_endpoint(options, of, endpoint, control, clock).unwrap();
    let (options, of, endpoint, control, clock) = parts();
    let mut ffn = FfnMesh::with_endpoint(options, of, endpoint, control, clock).unwrap();
    while !attention.is_complete() || !attention.is_linked() || !ffn.is_complete() {
        attention.poll().unwrap();
        ffn.poll().unwrap();
    }
    for rows in [1, ROWS] {
        let len = (rows * ROW_BYTES) as usize;
        let parts = [Part { key: 1, rows, row_bytes: ROW_BYTES, ..Part::default() }];
        let mut buffer = attention.acquire(0).unwrap();
        buffer.part_mut(0)[..len].fill(rows as u8 | 1);
        let pages = Pages::of(buffer.part_mut(0));
        let request = Request { group: 0, parts: &parts, ..Request::default() };
        let ticket = pages.unseen(|| attention.push_pull(buffer, request)).unwrap();
        while attention.status(ticket) == TicketStatus::Pending {
            ffn.poll().unwrap();
            attention.poll().unwrap();
            let Some(mut batch) = ffn.try_next_batch(Policy::All) else { continue };
            let segment = &mut batch.segments[0];
            let (input, output) = segment.split(0, 0);
            assert!(input.len() == len && input.iter().all(|byte| *byte == rows as u8 | 1));
            output[..len].fill(7);
            let pages = Pages::of(output);
            segment.set_reply(&parts).unwrap();
            pages.unseen(|| ffn.respond(batch)).unwrap();
        }
        let reply = attention.take(ticket).unwrap();
        assert!(reply.part(0, 0)[..len].iter().all(|byte| *byte == 7));
    }
}
