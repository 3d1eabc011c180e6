//! The scheduler: admits members, gives out ranks, introduces the two ends of every link, and says who was lost.
//!
//! ```text
//!   member ── FromMember ──▶ ┌─────────┐ ── Action::Send ──▶ member
//!   client ── generate ────▶ │  State  │ ── Action::Deliver ─▶ client
//!   clock  ── tick ────────▶ └─────────┘ ── Action::Note ───▶ log
//! ```
//!
//! [`State`] is pure: it does no I/O and reads no clock, so the simulation drives the very code that ships.
//! [`Server`] puts gRPC around it.

mod action;
mod alarm;
mod barriers;
mod links;
mod membership;
mod options;
mod sequences;
mod state;
mod stats;

pub use action::{Action, Event, SequenceId, Session, StatsId};
pub use options::{OptionsError, SchedulerOptions, SecretSource, system_secrets};
pub use sequences::GenerateRefusal;
pub use state::State;
