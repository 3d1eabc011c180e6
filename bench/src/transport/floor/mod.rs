//! The least that the machine can do it in: the same movement without any library.

mod cache_line;
mod memcpy;
mod sockets;

pub(super) use cache_line::bounce;
pub(super) use memcpy::{Arena, Places, copies};
pub(super) use sockets::{exchange, pump};
