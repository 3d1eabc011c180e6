//! Hot pieces by themselves, for whoever measures them.

pub use crate::cpu::Visits;
