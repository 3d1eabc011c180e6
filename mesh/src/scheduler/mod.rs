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
mod keeper;
mod links;
mod membership;
mod options;
mod sequences;
mod server;
mod service;
mod state;
mod stats;

#[cfg(test)]
mod tests;

pub use action::{Action, Event, SequenceId, Session, StatsId};
pub use options::{OptionsError, SchedulerOptions, SecretSource, system_secrets};
pub use sequences::GenerateRefusal;
pub use server::{Background, ServeError, ServeOptions, Server, spawn};
pub use state::State;
