//! Members with a progress thread of their own: the application's thread never polls.
//!
//! ```text
//!   application's thread                            progress thread
//!   acquire ─ fill ─ push_pull ──▶ commands ──▶  ┌───────────────┐
//!   wait    ◀── one outcome for each slot ◀──────│ AttentionMesh │◀──▶ endpoint, control plane
//!                                                └───────────────┘
//! ```
//!
//! What crosses between the threads are values in bounded queues made at the start: a slot's send buffer and its
//! [`Replies`](crate::Replies) are one each, so whoever holds them owns the slot. In the steady state nothing is
//! allocated and no lock is taken; a thread that has slept is woken by its endpoint's event, or unparked.

mod ask;
mod attention;
mod doze;
mod ffn;
#[cfg(all(test, stepmesh_loom))]
mod model;
mod progress;
mod seat;
mod standing;

pub use attention::{AttentionEngine, OwnedReply};
pub use ffn::FfnEngine;
pub use progress::ProgressOptions;
