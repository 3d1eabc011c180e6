//! A test double of the CUDA driver: the entry points that the runtime uses, as a shared library that is loaded in place of
//! `libcuda.so`. Streams run in order, each on a thread; stream memory operations, graphs and handles between processes do
//! what the driver says they do; errors come on demand. It computes nothing and measures nothing.
//!
//! Device addresses are host addresses with [`BIAS`] added, which no processor can reach: code that touches device memory
//! from the CPU faults here as it would on a machine.
#![allow(non_snake_case, clippy::missing_safety_doc, reason = "the driver's names and contracts")]

mod entries;
pub mod harness;
mod machine;
mod stream;

pub use machine::{BIAS, let_the_processor_reach};

use cudarc::driver::sys::{CUresult, CUstream};
use std::ffi::{CStr, c_char};
use std::sync::Arc;

/// Puts a call on a stream, in its order or into what it captures.
///
/// # Safety
/// `stream` came from `cuStreamCreate` and was not destroyed, or is null.
pub unsafe fn put(stream: CUstream, call: Arc<dyn Fn() + Send + Sync>) {
    // SAFETY: the caller's promise.
    unsafe { entries::stream_of(stream) }.add(vec![stream::Operation::Call(call)]);
}

/// From now on the entry point of that name fails with `error`, `times` times.
///
/// # Safety
/// `name` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fakeFail(name: *const c_char, error: CUresult, times: u32) {
    // SAFETY: the caller promises a string.
    let name = unsafe { CStr::from_ptr(name) };
    machine::get().fail(&name.to_string_lossy(), error, times);
}

/// From now on the driver says that it is of this version.
#[unsafe(no_mangle)]
pub extern "C" fn fakeVersion(version: i32) {
    machine::get().set_version(version);
}

/// From now on the device says this of itself.
#[unsafe(no_mangle)]
pub extern "C" fn fakeAttribute(attribute: i32, value: i32) {
    machine::get().set_attribute(attribute, value);
}

/// Bytes of device memory that are allocated.
#[unsafe(no_mangle)]
pub extern "C" fn fakeAllocated() -> usize {
    machine::get().allocated()
}
