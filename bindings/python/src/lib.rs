//! The Python API. `stepmesh._native` is what this crate makes; `stepmesh` and `fserver_lib` in `python/` are what is used.
//!
//! No code here wants the interpreter's lock while it holds a member's: whoever has the former may wait for the latter.

mod attention;
mod dtype;
mod error;
mod event;
mod ffn;
mod fserver;
mod gates;
mod member;
mod options;
mod part;
mod process;
mod replays;
mod scheduler;
mod shared;
mod streams;
mod tensor;
mod view;

use pyo3::prelude::*;
use std::sync::Once;

/// Prints what the transport and the mesh log, from this level on, to standard error: error, warn, info, debug, trace.
#[pyfunction]
fn log_to_stderr(level: &str) -> PyResult<()> {
    static ONCE: Once = Once::new();
    let level: tracing_subscriber::filter::LevelFilter =
        level.parse().map_err(|_| error::Failure::Invalid(format!("level: `{level}` is none")))?;
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr);
        subscriber.with_ansi(false).init();
    });
    Ok(())
}

/// What `stepmesh` is made of. Use that.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    process::watch_forks();
    module.add_class::<attention::AttentionMesh>()?;
    module.add_class::<attention::Reply>()?;
    module.add_class::<attention::SendBuffer>()?;
    module.add_class::<attention::Ticket>()?;
    module.add_class::<ffn::Batch>()?;
    module.add_class::<ffn::FfnMesh>()?;
    module.add_class::<ffn::Segment>()?;
    module.add_class::<gates::Gates>()?;
    module.add_class::<part::Part>()?;
    module.add_class::<replays::AttentionReplays>()?;
    module.add_class::<replays::FfnReplays>()?;
    module.add_class::<scheduler::Scheduler>()?;
    module.add_class::<tensor::Tensor>()?;
    module.add_class::<fserver::Server>()?;
    module.add_class::<fserver::StreamFlags>()?;
    module.add_class::<fserver::Worker>()?;
    module.add_function(wrap_pyfunction!(fserver::add_one, module)?)?;
    module.add_function(wrap_pyfunction!(fserver::nanosecond, module)?)?;
    module.add_function(wrap_pyfunction!(fserver::store_flag, module)?)?;
    module.add_function(wrap_pyfunction!(fserver::wait_flag, module)?)?;
    module.add_function(wrap_pyfunction!(process::end, module)?)?;
    module.add_function(wrap_pyfunction!(log_to_stderr, module)?)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
