//! A test double of a GPU that computes: the fake driver with the entry points that launch kernels, and NVRTC's with a C++
//! compiler behind them. The kernels' own source runs, every block and thread of it, as the processor's code: slowly, and with
//! the products of tensor cores in plain C++. What it computes is right or wrong; how long it takes says nothing.
//!
//! One library stands for both: it is found in place of `libcuda.so`, and named by `STEPMESH_NVRTC`. Device addresses are host
//! addresses here, so that code which touches device memory from the CPU is not caught, as it is by the fake driver alone.
#![cfg(target_os = "linux")]
#![allow(non_snake_case, clippy::missing_safety_doc, reason = "the driver's names and contracts")]

mod compiler;
mod kernels;

pub use stepmesh_fake_cuda::*;

/// Before anything is allocated: when the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static LOADED: extern "C" fn() = loaded;

extern "C" fn loaded() {
    stepmesh_fake_cuda::let_the_processor_reach();
}
