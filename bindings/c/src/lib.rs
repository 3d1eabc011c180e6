//! The C API: a member of a mesh behind a number, calls that return a status, nothing that unwinds.
//!
//! The header is `include/stepmesh.h`, which a test keeps equal to what this crate says. An attention instance calls
//! `acquire` → `send_part` → `push_pull` → `wait` → `reply`; an FFN instance `next_batch` → `segment_part` →
//! `segment_reply` → `set_reply` → `respond`. `examples/echo.c` does both.
//!
//! # Safety
//! One contract for all functions: a pointer is null, or it is aligned and points to what the parameter's type and
//! length say, for the length of the call. Handles, tickets, batches and indices are numbers that are looked up; any
//! value is safe to give.
#![allow(clippy::missing_safety_doc, reason = "one contract for all, above")]

mod arguments;
mod attention;
mod event;
mod ffn;
mod join;
mod members;
mod status;
mod tensor;

pub use attention::*;
pub use event::*;
pub use ffn::*;
pub use join::*;
pub use members::*;
pub use status::{StepmeshStatus, stepmesh_last_error_message};
pub use tensor::{StepmeshDtype, StepmeshPart, StepmeshTensor};
