//! GPU memory, streams, graphs and gates on a driver that is a test double: ownership, order and errors, not speed. A test
//! runs in a process of its own, in which the double is found in place of `libcuda.so`.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod device;
mod double;
mod gates;
mod memory;
mod refusals;
