//! The processes of a deployment: what `scheduler`, `attention` and `ffn` run.

mod log;
mod member;
mod scheduler;

pub(crate) use log::Log;
pub(crate) use member::{run_attention, run_ffn};
pub(crate) use scheduler::run_scheduler;
