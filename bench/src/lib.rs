//! What the benches measure on: a transfer of Step-3's full shapes, and one layer of the tiny checkpoint.

mod layer;
mod transfer;

pub use layer::TinyLayer;
pub use transfer::{HIDDEN, Transfer};
