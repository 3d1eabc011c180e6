//! What the benches measure on — a transfer of Step-3's full shapes, one layer of the tiny checkpoint — and the suite of
//! the transports against the floors of the machine.

mod layer;
mod transfer;
pub mod transport;

pub use layer::TinyLayer;
pub use transfer::{HIDDEN, Transfer};
