//! Members that make progress while the application computes.
//!
//! ```text
//!   application's thread                  the member                progress thread
//!   acquire, push_pull, respond ──takes──▶ ┌────────┐
//!   wait, next_batch, sleep ─────drives──▶ │  mesh  │ ◀──drives── while no calls come
//!                                          └────────┘
//! ```
//!
//! The member is in the hands of one thread at a time (`baton.rs`). A call takes it, and one that waits drives it, so that nothing
//! that a call does or waits for passes from thread to thread. While calls come the progress thread looks on; when none has come
//! for a tenth of a millisecond it drives the member itself, and sleeps with it, so that transfers that need a CPU (over tcp) go on, and
//! links come and go. In the steady state nothing is allocated, and a call makes no system call of its own unless the progress
//! thread sleeps.

mod attention;
mod baton;
mod engine;
mod ffn;
#[cfg(all(test, stepmesh_loom))]
mod model;

pub use attention::{AttentionEngine, OwnedReply};
pub use engine::ProgressOptions;
pub use ffn::FfnEngine;
