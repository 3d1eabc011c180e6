//! The least that the machine can do it in: the same movement without any library.

mod cache_line;
mod fma;
mod memcpy;
mod perftest;
mod slots;
mod sockets;

pub(crate) use cache_line::bounce;
pub(crate) use fma::fma_peak;
pub(crate) use memcpy::{Arena, Places, copies};
pub(crate) use perftest::Perftest;
pub(crate) use slots::slot_echo;
pub(crate) use sockets::{exchange, pump};
