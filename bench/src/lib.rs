//! The latency suite: the transports and the mesh against the floors of the machine, and other systems beside them; and
//! what the criterion benches measure on.

mod cpus;
mod drift;
mod error;
mod floor;
mod layer;
mod machine;
mod process;
mod progress;
mod report;
mod scheduling;
mod shared;
mod timing;
mod transfer;

pub mod compare;
pub mod gpu;
pub mod model;
pub mod page;
pub mod pipeline;
pub mod pushpull;
pub mod transport;

pub use cpus::Cpus;
pub use drift::Drift;
pub use error::BenchError;
pub use layer::TinyLayer;
pub use machine::Machine;
pub use process::Program;
pub use progress::{Progress, Watcher};
pub use report::Report;
pub use scheduling::Scheduling;
pub use transfer::{HIDDEN, Transfer};
