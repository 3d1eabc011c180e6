//! StepMesh's calls on a mesh: lists of tensors under the user's keys, broadcast to all servers, answered by each. The
//! Python module `fserver_lib` gives them their names.
//!
//! A request takes one microbatch's slot: part 0 is the table ([`stepmesh_embed::Request`]), part 1 the tensors. Replies
//! are copied to the tensors that wait for them as soon as somebody polls, which frees the slot.

mod copies;
mod flags;
mod flights;
mod inbox;
mod server;
mod spare;
mod worker;

pub(crate) use flags::{StreamFlags, add_one, nanosecond, store_flag, wait_flag};
pub(crate) use server::Server;
pub(crate) use worker::Worker;

use crate::error::Failure;
use stepmesh_embed::MAX_LIST_BYTES;
use stepmesh_mesh::{PartSpec, SlotLayout};
use stepmesh_proto::Part;

/// Bytes of a page, which tensors' part is made of.
const PAGE: usize = 4096;

/// Nanoseconds of the monotonic clock, whose beginning all processes of a host share.
fn now_ns() -> u64 {
    stepmesh_transport::Clock::monotonic_ns()
}

/// Slots for tables and for `slot_bytes` bytes of tensors each way.
fn layout(slots: u16, slot_bytes: usize) -> Result<SlotLayout, Failure> {
    let pages = u32::try_from(slot_bytes.div_ceil(PAGE)).unwrap_or(u32::MAX);
    let parts = || {
        let table = PartSpec { row_bytes: MAX_LIST_BYTES as u32, max_rows: 1 };
        vec![table, PartSpec { row_bytes: PAGE as u32, max_rows: pages }]
    };
    Ok(SlotLayout::new(slots, parts(), parts())?)
}

/// The two parts of a transfer.
fn parts(table: usize, tensors: usize) -> [Part; 2] {
    [table, tensors].map(|bytes| Part { rows: bytes as u32, row_bytes: 1, ..Part::default() })
}
