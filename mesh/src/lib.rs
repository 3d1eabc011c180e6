//! The StepMesh core: members, links, slots; `push_pull` / `wait` on the attention side, `next_batch` / `respond` on the
//! FFN side.
//!
//! What decides is pure and tested on a virtual clock: [`scheduler::State`], the immediate counters, the arrival
//! policies, the tickets. A member joins them to an endpoint of any provider and to the control plane, and is driven by
//! its owner's calls, or by a thread of its own ([`threaded`]).

mod arrivals;
mod attention;
mod counter;
mod error;
mod event;
mod ffn;
#[cfg(test)]
#[path = "../../fuzz/inputs.rs"]
mod fuzz_inputs;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod layout;
mod link;
mod member;
#[doc(hidden)]
pub mod probe;
mod reply;
mod send;
mod step;
mod sync;
mod tickets;
mod trace;

pub mod control;
pub mod scheduler;
pub mod threaded;

pub use arrivals::Policy;
pub use attention::{AttentionMesh, Request};
pub use error::{MeshError, TicketFailure};
pub use event::{MeshEvent, Peer, Role};
pub use ffn::{Batch, FfnMesh, PartArray, Segment};
pub use layout::{Direction, PartSpec, SlotLayout};
pub use member::MemberOptions;
pub use reply::{Replies, Reply};
pub use send::SendBuffer;
pub use step::{AttentionStep, FfnStep, FfnWork, Transfer};
pub use tickets::{Ticket, TicketStatus};
pub use trace::Trace;
