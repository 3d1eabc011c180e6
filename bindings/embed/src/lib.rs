//! What the bindings to other languages share: joining in one call, answering the scheduler in place of a daemon,
//! sharing a member between threads, and lists of tensors under keys of the user's.

mod join;
mod news;
mod tensor_list;
mod turnstile;

pub use join::{JoinError, Joining};
pub use news::answer;
pub use tensor_list::{Entry, List, ListError, MAX_DIMENSIONS, MAX_LIST_BYTES, Reply, Request, Stamp};
pub use turnstile::{Driven, Turnstile};
