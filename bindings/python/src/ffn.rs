//! The FFN side: `next_batch` → compute in place → `respond`.

use crate::attention::barrier_group;
use crate::error::Failure;
use crate::event;
use crate::member::Ffn;
use crate::options::Options;
use crate::part::{Part, Parts};
use crate::shared::{Shared, seconds};
use crate::tensor::Tensor;
use crate::view::view;
use crate::{dtype, process};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use std::sync::{Arc, Mutex, PoisonError};
use stepmesh_mesh::{Batch as MeshBatch, MeshError, Policy, Segment as MeshSegment, SlotLayout};
use stepmesh_proto::Dtype;
use stepmesh_transport::{Waker, copy_for_peer};

/// Joins and starts a progress thread if one is asked for.
pub(crate) fn join(py: Python<'_>, options: Options, layout: Option<SlotLayout>) -> Result<(Ffn, Waker), Failure> {
    let plan = options.check(layout)?;
    let mut raised = None;
    let joined = process::detached(py, || {
        plan.joining.ffn(|| {
            raised = Python::attach(|py| py.check_signals()).err();
            raised.is_some()
        })
    });
    if let Some(error) = raised {
        return Err(error.into());
    }
    let mesh = joined?;
    Ok(Ffn::new(mesh, plan.progress)?)
}

/// An FFN instance.
#[pyclass(frozen, subclass, module = "stepmesh._native")]
pub(crate) struct FfnMesh {
    pub(crate) shared: Arc<Shared<Ffn>>,
}

/// The requests of one microbatch and group, a segment each. One that is dropped without an answer fails its requests.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct Batch {
    batch: Mutex<Option<MeshBatch>>,
    /// The microbatch.
    #[pyo3(get)]
    microbatch: u16,
    /// The group: the layer.
    #[pyo3(get)]
    group: u32,
    segments: usize,
    shared: Arc<Shared<Ffn>>,
}

impl Batch {
    fn with<R>(&self, index: usize, body: impl FnOnce(&mut MeshSegment) -> Result<R, Failure>) -> Result<R, Failure> {
        let mut batch = self.batch.lock().unwrap_or_else(PoisonError::into_inner);
        let batch = batch.as_mut().ok_or_else(|| Failure::Invalid("batch: it has been answered".to_owned()))?;
        let segment = batch.segments.get_mut(index);
        body(segment.ok_or_else(|| Failure::Invalid(format!("segment: {index} of {}", self.segments)))?)
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        let batch = self.batch.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut batch) = batch {
            batch.segments.iter_mut().for_each(|segment| segment.fail("dropped"));
            self.shared.with_unattached(|ffn| ffn.respond(batch).ok());
        }
    }
}

#[pymethods]
impl Batch {
    fn __len__(&self) -> usize {
        self.segments
    }

    fn __getitem__(slf: &Bound<'_, Self>, index: isize) -> PyResult<Segment> {
        let count = slf.get().segments as isize;
        let at = if index < 0 { index + count } else { index };
        if at < 0 || at >= count {
            return Err(pyo3::exceptions::PyIndexError::new_err(format!("segment {index} of {count}")));
        }
        Ok(Segment { batch: slf.clone().unbind(), index: at as usize })
    }
}

/// One attention instance's rows in a batch: what it sent, and where the reply goes.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct Segment {
    batch: Py<Batch>,
    index: usize,
}

impl Segment {
    fn with<R>(&self, body: impl FnOnce(&mut MeshSegment) -> Result<R, Failure>) -> PyResult<R> {
        Ok(self.batch.get().with(self.index, body)?)
    }
}

#[pymethods]
impl Segment {
    /// The attention instance.
    #[getter]
    fn rank(&self) -> PyResult<usize> {
        self.with(|segment| Ok(segment.rank()))
    }

    /// Rows of the first part.
    #[getter]
    fn rows(&self) -> PyResult<usize> {
        self.with(|segment| Ok(segment.rows()))
    }

    /// The application's 16 bytes.
    #[getter]
    fn app<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.with(|segment| Ok(segment.app()))?))
    }

    /// The parts that were sent.
    #[getter]
    fn parts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let parts = self.with(|segment| Ok(segment.parts().iter().map(Part::of).collect::<Vec<_>>()))?;
        PyList::new(py, parts)
    }

    /// A part that was sent, `[rows, elements of a row]`, in the slot where it landed: on shm the attention instance's
    /// own, which this process may not write. It holds until `respond`.
    #[pyo3(signature = (part=0))]
    fn tensor(&self, part: usize) -> PyResult<Tensor> {
        self.with(|segment| {
            let used = segment.parts().get(part).copied();
            let found = used.and_then(|used| Some((used, segment.part_place(part)?)));
            let (used, place) =
                found.ok_or_else(|| Failure::Invalid(format!("part: the request has no part {part}")))?;
            Tensor::of_part(&used, place, false)
        })
    }

    /// A part of the reply, to be filled in place; the whole part as bytes by default. It holds until `respond`.
    #[pyo3(signature = (part=0, shape=None, dtype=None))]
    fn reply(&self, part: usize, shape: Option<Vec<usize>>, dtype: Option<&Bound<'_, PyAny>>) -> PyResult<Tensor> {
        let dtype = dtype.map_or(Ok(Dtype::Bytes), dtype::extract)?;
        self.with(|segment| {
            let place = segment.reply_place(part);
            let place = place.ok_or_else(|| Failure::Invalid(format!("part: a reply has no part {part}")))?;
            Tensor::new(place, dtype, shape, false)
        })
    }

    /// Says which parts of the reply are in use.
    fn set_reply(&self, parts: &Bound<'_, PyAny>) -> PyResult<()> {
        let parts = Parts::read(parts)?;
        self.with(|segment| Ok(segment.set_reply(parts.in_use())?))
    }

    /// Copies a tensor into a part of the reply and says what it is; for tensors that cannot be made in place.
    #[pyo3(signature = (part, tensor, key=0))]
    fn put(&self, part: usize, tensor: &Bound<'_, PyAny>, key: u64) -> PyResult<Part> {
        let from = view(tensor, false, &|| "tensor".to_owned())?;
        self.with(|segment| {
            let to = segment.reply_mut(part);
            let room = to.len();
            // SAFETY: read once, here, with the interpreter's lock in hand.
            let bytes = unsafe { from.as_slice() };
            let to = to.get_mut(..bytes.len()).ok_or_else(|| {
                Failure::Invalid(format!("tensor: {} bytes do not fit part {part} of {room} bytes", bytes.len()))
            })?;
            // SAFETY: two slices of one length.
            unsafe { copy_for_peer(bytes.as_ptr(), to.as_mut_ptr(), to.len()) };
            let rows = from.shape().first().copied().unwrap_or(1) as u32;
            let row_bytes = (from.shape().iter().skip(1).product::<usize>() * from.dtype.bytes()) as u32;
            Ok(Part(stepmesh_proto::Part { key, dtype: from.dtype, rows, row_bytes, offset: 0 }))
        })
    }

    /// Answers that this segment could not be processed; 16 bytes of the reason travel.
    fn fail(&self, reason: &str) -> PyResult<()> {
        self.with(|segment| {
            segment.fail(reason);
            Ok(())
        })
    }
}

/// A policy as Python says it: "all", "any", ("at_least", ranks), ("deadline", seconds).
fn policy(given: Option<&Bound<'_, PyAny>>) -> Result<Policy, Failure> {
    let Some(given) = given else { return Ok(Policy::All) };
    let wrong = || {
        let known = "\"all\", \"any\", (\"at_least\", ranks) or (\"deadline\", seconds)";
        Failure::Invalid(format!("policy: {given}: {known}"))
    };
    if let Ok(name) = given.extract::<String>() {
        return match name.as_str() {
            "all" => Ok(Policy::All),
            "any" => Ok(Policy::Any),
            _ => Err(wrong()),
        };
    }
    let (name, bound): (String, Bound<'_, PyAny>) = given.extract().map_err(|_| wrong())?;
    match name.as_str() {
        "at_least" => Ok(Policy::AtLeast(bound.extract().map_err(|_| wrong())?)),
        "deadline" => Ok(Policy::Deadline(seconds(Some(bound.extract().map_err(|_| wrong())?))?)),
        _ => Err(wrong()),
    }
}

#[pymethods]
impl FfnMesh {
    #[new]
    fn new(py: Python<'_>, options: Options) -> PyResult<Self> {
        let (ffn, waker) = join(py, options, None)?;
        Ok(Self { shared: Shared::new(ffn, waker) })
    }

    /// This instance's rank.
    #[getter]
    fn rank(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.shared.with(py, |ffn| Ok(ffn.rank))?)
    }

    /// Attention instances of the deployment.
    #[getter]
    fn attention(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.shared.with(py, |ffn| Ok(ffn.attention))?)
    }

    /// FFN instances of the deployment: how many shards there are.
    #[getter]
    fn ffn(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.shared.with(py, |ffn| Ok(ffn.ffn))?)
    }

    /// All ranks are held and all links are up.
    #[getter]
    fn complete(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.shared.with(py, |ffn| Ok(ffn.is_complete()))?)
    }

    /// Waits until the whole deployment is there.
    #[pyo3(signature = (timeout=Some(30.0)))]
    fn wait_complete(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        let timeout = seconds(timeout)?;
        let complete = self.shared.wait(py, timeout, |ffn| {
            ffn.is_complete().then_some(Ok(())).or_else(|| ffn.news.scheduler_lost().map(|error| Err(error.into())))
        })?;
        Ok(complete.ok_or(Failure::Mesh(MeshError::Timeout(timeout)))?)
    }

    /// The next batch that the policy allows, or None after `timeout` seconds; of `microbatches` only if they are given.
    #[pyo3(signature = (policy=None, timeout=Some(1.0), microbatches=None))]
    fn next_batch(
        &self,
        py: Python<'_>,
        policy: Option<&Bound<'_, PyAny>>,
        timeout: Option<f64>,
        microbatches: Option<Vec<u16>>,
    ) -> PyResult<Option<Batch>> {
        let (policy, timeout) = (self::policy(policy)?, seconds(timeout)?);
        let batch = self.shared.wait(py, timeout, |ffn| {
            ffn.try_next_batch(policy, microbatches.as_deref()).map_err(Failure::from).transpose()
        });
        Ok(batch?.map(|batch| Batch {
            microbatch: batch.microbatch,
            group: batch.group,
            segments: batch.segments.len(),
            batch: Mutex::new(Some(batch)),
            shared: self.shared.clone(),
        }))
    }

    /// Sends every segment's reply. Segments whose attention instance is gone are dropped: its loss is an event.
    fn respond(&self, py: Python<'_>, batch: &Bound<'_, Batch>) -> PyResult<()> {
        let batch = batch.get();
        if batch.shared.number() != self.shared.number() {
            return Err(Failure::Unknown("batch: it is another mesh's".to_owned()).into());
        }
        let taken = batch.batch.lock().unwrap_or_else(PoisonError::into_inner).take();
        let taken = taken.ok_or_else(|| Failure::Invalid("batch: it has been answered".to_owned()))?;
        Ok(self.shared.with(py, |ffn| Ok(ffn.respond(taken)?))?)
    }

    /// Where an attention instance's request part lands, before anything has come: for work that is captured ahead.
    #[pyo3(signature = (rank, microbatch, part=0, shape=None, dtype=None))]
    fn request_tensor(
        &self,
        py: Python<'_>,
        rank: usize,
        microbatch: u16,
        part: usize,
        shape: Option<Vec<usize>>,
        dtype: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Tensor> {
        let place = self.shared.with(py, |ffn| Ok(ffn.driven()?.request_place(rank, microbatch, part)))?;
        Ok(Tensor::at(place, dtype, shape)?)
    }

    /// Where the reply part for an attention instance is produced, as `request_tensor`.
    #[pyo3(signature = (rank, microbatch, part=0, shape=None, dtype=None))]
    fn reply_tensor(
        &self,
        py: Python<'_>,
        rank: usize,
        microbatch: u16,
        part: usize,
        shape: Option<Vec<usize>>,
        dtype: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Tensor> {
        let place = self.shared.with(py, |ffn| Ok(ffn.driven()?.reply_place(rank, microbatch, part)))?;
        Ok(Tensor::at(place, dtype, shape)?)
    }

    /// Where a request part of a microbatch lies for all ranks: the address of rank 0's first row, and the bytes from one
    /// rank's first row to the next's.
    #[pyo3(signature = (microbatch, part=0))]
    fn part_array(&self, py: Python<'_>, microbatch: u16, part: usize) -> PyResult<Option<(usize, usize)>> {
        let array = self.shared.with(py, |ffn| Ok(ffn.part_array(microbatch, part)))?;
        Ok(array.map(|array| (array.base, array.rank_stride_bytes)))
    }

    /// Makes progress without waiting.
    fn poll(&self, py: Python<'_>) -> PyResult<()> {
        Ok(self.shared.poll(py)?)
    }

    /// The next event as a dict, or None after `timeout` seconds.
    #[pyo3(signature = (timeout=Some(0.0)))]
    fn next_event<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let event = self.shared.wait(py, seconds(timeout)?, |ffn| ffn.news.next().map(Ok))?;
        event.map(|event| event::to_dict(py, &event)).transpose()
    }

    /// Waits until every member of the group has come to the barrier of this name as often as this one has.
    #[pyo3(signature = (name="barrier", group="all", timeout=Some(60.0)))]
    fn barrier(&self, py: Python<'_>, name: &str, group: &str, timeout: Option<f64>) -> PyResult<()> {
        let (timeout, group) = (seconds(timeout)?, barrier_group(group)?);
        let barrier = self.shared.with(py, |ffn| {
            let (barrier, message) = ffn.news.enter(name, group);
            ffn.send_control(message)?;
            Ok(barrier)
        })?;
        let met = self.shared.wait(py, timeout, |ffn| ffn.news.released(&barrier))?;
        Ok(met.ok_or(Failure::Mesh(MeshError::Timeout(timeout)))?)
    }

    /// Leaves the mesh. Tensors that are still held keep their memory.
    fn close(&self, py: Python<'_>) {
        self.shared.close(py);
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_raised))]
    fn __exit__(&self, py: Python<'_>, _raised: &Bound<'_, PyAny>) {
        self.close(py);
    }
}
