//! Members with progress threads over real transports and a real scheduler, all in one process.

#![allow(clippy::unwrap_used)]

mod deployment;
mod engines;
mod faults;
mod shapes;
