//! Flags, by which two parties signal without a call between them: in host memory, or set and awaited by a GPU's streams.

use super::now_ns;
use crate::error::Failure;
use crate::process;
use crate::shared::seconds;
use crate::streams::Streams;
use crate::view::{View, view, view_near};
use pyo3::prelude::*;
use std::sync::atomic::{AtomicI32, AtomicI64, Ordering};
use std::time::{Duration, Instant};
use stepmesh_proto::Dtype;
use stepmesh_transport::TransportError;
use stepmesh_transport::cuda::{Context, CudaError, Stream, Word};

/// How long to spin between two looks at signals.
const LOOK: Duration = Duration::from_millis(50);

/// Refuses a tensor without a first element, or whose first is not aligned.
fn check(view: &View, name: &str) -> Result<(), Failure> {
    let bytes = view.dtype.bytes();
    if view.bytes < bytes || !view.address.is_multiple_of(bytes) {
        return Err(Failure::Invalid(format!("{name}: a flag is the first element of a tensor, and it has none")));
    }
    Ok(())
}

fn no_flag(name: &str) -> Failure {
    Failure::Type(format!("{name}: a flag is an int32 or an int64"))
}

/// The first element of a tensor of integers.
enum Flag<'a> {
    I32(&'a AtomicI32),
    I64(&'a AtomicI64),
}

impl Flag<'_> {
    fn of<'a>(view: &'a View, name: &str) -> Result<Flag<'a>, Failure> {
        check(view, name)?;
        match view.dtype {
            // SAFETY: aligned, in bounds, and held by the view; whoever else uses a flag does so atomically.
            Dtype::I32 => Ok(Flag::I32(unsafe { AtomicI32::from_ptr(view.address as *mut i32) })),
            // SAFETY: as above.
            Dtype::I64 => Ok(Flag::I64(unsafe { AtomicI64::from_ptr(view.address as *mut i64) })),
            _ => Err(no_flag(name)),
        }
    }

    fn load(&self) -> i64 {
        match self {
            Self::I32(flag) => flag.load(Ordering::Acquire).into(),
            Self::I64(flag) => flag.load(Ordering::Acquire),
        }
    }

    fn store(&self, value: i64) {
        match self {
            Self::I32(flag) => flag.store(value as i32, Ordering::Release),
            Self::I64(flag) => flag.store(value, Ordering::Release),
        }
    }
}

/// Flags that a GPU's streams set and wait for, without a kernel.
#[pyclass(frozen, module = "stepmesh._native")]
pub(crate) struct StreamFlags {
    gpu: u32,
    streams: Streams,
}

#[pymethods]
impl StreamFlags {
    #[new]
    fn new(gpu: u32) -> PyResult<Self> {
        let context = Context::open(gpu).map_err(|error| Failure::from(TransportError::from(error)))?;
        Ok(Self { gpu, streams: Streams::new(context) })
    }

    /// Whether a tensor is on the GPU.
    fn has(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(view_near(tensor, true, Some(self.gpu), &|| "tensor".to_owned())?.gpu.is_some())
    }

    /// Has the stream set a flag, after all that it was given before. `flag` is on the GPU or pinned for it.
    fn write(&self, flag: &Bound<'_, PyAny>, value: i64, stream: usize) -> PyResult<()> {
        let (address, word) = self.word(flag, value)?;
        // SAFETY: aligned and found to be in reach; the program keeps it.
        self.reaching(stream, address, |stream, address| unsafe { stream.write_word(address, word) })
    }

    /// Has the stream wait until a flag is at least `value`.
    fn wait(&self, flag: &Bound<'_, PyAny>, value: i64, stream: usize) -> PyResult<()> {
        let (address, word) = self.word(flag, value)?;
        // SAFETY: as for `write`.
        self.reaching(stream, address, |stream, address| unsafe { stream.wait_word(address, word) })
    }
}

impl StreamFlags {
    /// Calls with a stream and where it finds the address, if it does.
    fn reaching(
        &self,
        stream: usize,
        address: u64,
        call: impl FnOnce(&Stream, u64) -> Result<(), CudaError>,
    ) -> PyResult<()> {
        let mut found = None;
        self.streams.on(stream, |stream| {
            found = stream.finds(address)?;
            found.map_or(Ok(()), |address| call(stream, address))
        })?;
        if found.is_some() {
            return Ok(());
        }
        let why = "flag: host memory that is not pinned, which no stream reaches: pin_memory() first";
        Err(Failure::Invalid(why.to_owned()).into())
    }

    fn word(&self, flag: &Bound<'_, PyAny>, value: i64) -> Result<(u64, Word), Failure> {
        let view = view_near(flag, true, Some(self.gpu), &|| "flag".to_owned())?;
        check(&view, "flag")?;
        match view.dtype {
            Dtype::I32 => Ok((view.address as u64, Word::U32(value as u32))),
            Dtype::I64 => Ok((view.address as u64, Word::U64(value as u64))),
            _ => Err(no_flag("flag")),
        }
    }
}

fn at(tensor: &Bound<'_, PyAny>, name: &'static str) -> Result<View, Failure> {
    view(tensor, true, &|| name.to_owned())
}

/// Sets a flag to the value of `seq`; what was written before is seen by whoever sees it.
#[pyfunction]
pub(crate) fn store_flag(flag: &Bound<'_, PyAny>, seq: &Bound<'_, PyAny>) -> PyResult<()> {
    let (flag, seq) = (at(flag, "flag")?, at(seq, "seq")?);
    Flag::of(&flag, "flag")?.store(Flag::of(&seq, "seq")?.load());
    Ok(())
}

/// Waits until a flag has the value of `seq`, or a greater one.
#[pyfunction]
#[pyo3(signature = (flag, seq, timeout=Some(10.0)))]
pub(crate) fn wait_flag(
    py: Python<'_>,
    flag: &Bound<'_, PyAny>,
    seq: &Bound<'_, PyAny>,
    timeout: Option<f64>,
) -> PyResult<()> {
    let (flag, seq, timeout) = (at(flag, "flag")?, at(seq, "seq")?, seconds(timeout)?);
    let (flag, seq) = (Flag::of(&flag, "flag")?, Flag::of(&seq, "seq")?);
    let (wanted, started) = (seq.load(), Instant::now());
    loop {
        let look = Instant::now() + LOOK.min(timeout.saturating_sub(started.elapsed()));
        let seen = process::detached(py, || {
            while flag.load() < wanted {
                if Instant::now() >= look || process::is_ending() {
                    return false;
                }
                std::thread::yield_now();
            }
            true
        });
        if seen {
            return Ok(());
        }
        if started.elapsed() >= timeout || process::is_ending() {
            let value = flag.load();
            return Err(Failure::Timeout(format!("the flag is {value} after {timeout:?}, not {wanted} yet")).into());
        }
        py.check_signals()?;
    }
}

/// Adds one to `seq`.
#[pyfunction]
pub(crate) fn add_one(seq: &Bound<'_, PyAny>) -> PyResult<()> {
    let seq = at(seq, "seq")?;
    let seq = Flag::of(&seq, "seq")?;
    seq.store(seq.load().wrapping_add(1));
    Ok(())
}

/// The monotonic clock, in nanoseconds.
#[pyfunction]
pub(crate) fn nanosecond() -> u64 {
    now_ns()
}
