//! The attention side: `acquire` → fill → `push_pull` → `wait` → the reply, in place.

use crate::error::Failure;
use crate::event;
use crate::member::{Attention, Landed};
use crate::options::Options;
use crate::part::{Part, Parts, app};
use crate::shared::{Shared, seconds};
use crate::tensor::Tensor;
use crate::view::view;
use crate::{dtype, process};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use stepmesh_mesh::{MeshError, Request, SendBuffer as Buffer, SlotLayout, Ticket as MeshTicket};
use stepmesh_proto::Dtype;
use stepmesh_proto::control::BarrierGroup;
use stepmesh_transport::{Waker, copy_for_peer};

/// The group that a barrier's name stands for.
pub(crate) fn barrier_group(name: &str) -> Result<BarrierGroup, Failure> {
    match name {
        "all" => Ok(BarrierGroup::All),
        "attention" => Ok(BarrierGroup::Attention),
        "ffn" => Ok(BarrierGroup::Ffn),
        other => Err(Failure::Invalid(format!("group: `{other}`: \"all\", \"attention\" or \"ffn\""))),
    }
}

/// Joins and starts a progress thread if one is asked for.
pub(crate) fn join(
    py: Python<'_>,
    options: Options,
    layout: Option<SlotLayout>,
) -> Result<(Attention, Waker), Failure> {
    let plan = options.check(layout)?;
    let microbatches = plan.joining.member.layout.microbatches();
    let mut raised = None;
    let joined = process::detached(py, || {
        plan.joining.attention(|| {
            raised = Python::attach(|py| py.check_signals()).err();
            raised.is_some()
        })
    });
    if let Some(error) = raised {
        return Err(error.into());
    }
    let mesh = joined?;
    Ok(Attention::new(mesh, microbatches, plan.progress)?)
}

/// An attention instance.
#[pyclass(frozen, subclass, module = "stepmesh._native")]
pub(crate) struct AttentionMesh {
    pub(crate) shared: Arc<Shared<Attention>>,
}

/// What `push_pull` returns and `wait` consumes.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct Ticket {
    ticket: MeshTicket,
    mesh: u64,
}

#[pymethods]
impl Ticket {
    /// The microbatch.
    #[getter]
    fn microbatch(&self) -> u16 {
        self.ticket.microbatch()
    }
}

/// A microbatch's send slot, owned until it is pushed or released.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct SendBuffer {
    buffer: Mutex<Option<Buffer>>,
    microbatch: u16,
}

impl SendBuffer {
    fn take(&self) -> Result<Buffer, Failure> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(|| self.gone())
    }

    fn gone(&self) -> Failure {
        Failure::Invalid(format!(
            "buffer: that of microbatch {} was pushed or released: acquire it anew",
            self.microbatch
        ))
    }
}

#[pymethods]
impl SendBuffer {
    /// The microbatch.
    #[getter]
    fn microbatch(&self) -> u16 {
        self.microbatch
    }

    /// A part of the slot as a tensor, to be filled in place; the whole part as bytes by default.
    #[pyo3(signature = (part=0, shape=None, dtype=None))]
    fn tensor(&self, part: usize, shape: Option<Vec<usize>>, dtype: Option<&Bound<'_, PyAny>>) -> PyResult<Tensor> {
        let dtype = dtype.map_or(Ok(Dtype::Bytes), dtype::extract)?;
        let buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let place = buffer.as_ref().ok_or_else(|| self.gone())?.part_place(part);
        let place = place.ok_or_else(|| Failure::Invalid(format!("part: a request has no part {part}")))?;
        Ok(Tensor::new(place, dtype, shape, false)?)
    }

    /// Copies a tensor into a part and says what it is; for tensors that cannot be made in place.
    #[pyo3(signature = (part, tensor, key=0))]
    fn put(&self, part: usize, tensor: &Bound<'_, PyAny>, key: u64) -> PyResult<Part> {
        let from = view(tensor, false, &|| "tensor".to_owned())?;
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = buffer.as_mut().ok_or_else(|| self.gone())?;
        if let Some((region, _)) = buffer.part_place(part).filter(|(region, _)| region.on_device()) {
            let what =
                format!("tensor: part {part} is on {:?}: copy with the GPU's calls into buffer.tensor(...)", region);
            return Err(Failure::Device(what).into());
        }
        let to = buffer.part_mut(part);
        let room = to.len();
        // SAFETY: read once, here, with the interpreter's lock in hand.
        let bytes = unsafe { from.as_slice() };
        let to = to.get_mut(..bytes.len()).ok_or_else(|| {
            Failure::Invalid(format!("tensor: {} bytes do not fit part {part} of {room} bytes", bytes.len()))
        })?;
        // SAFETY: two slices of one length.
        unsafe { copy_for_peer(bytes.as_ptr(), to.as_mut_ptr(), to.len()) };
        let rows = from.shape().first().copied().unwrap_or(1);
        let row_bytes = from.shape().iter().skip(1).product::<usize>() * from.dtype.bytes();
        Ok(Part(stepmesh_proto::Part {
            key,
            dtype: from.dtype,
            rows: rows as u32,
            row_bytes: row_bytes as u32,
            offset: 0,
        }))
    }

    /// Gives the slot back without sending it.
    fn release(&self) -> PyResult<()> {
        Ok(self.take().map(drop)?)
    }
}

/// The replies of all FFN instances to one request, in the slots where they landed. They hold until the microbatch is
/// pushed again.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct Reply {
    ranks: Vec<Landed>,
}

impl Reply {
    fn rank(&self, rank: usize) -> Result<&Landed, Failure> {
        let ranks = self.ranks.len();
        self.ranks.get(rank).ok_or_else(|| Failure::Invalid(format!("rank: {rank} of {ranks} FFN instances")))
    }
}

#[pymethods]
impl Reply {
    /// FFN instances that replied: all of them.
    fn __len__(&self) -> usize {
        self.ranks.len()
    }

    /// What one FFN instance's reply has.
    #[pyo3(signature = (rank=0))]
    fn parts<'py>(&self, py: Python<'py>, rank: usize) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.rank(rank)?.parts.iter().map(|(part, _)| Part::of(part)).collect::<Vec<_>>())
    }

    /// A part of one FFN instance's reply, `[rows, elements of a row]`.
    #[pyo3(signature = (rank=0, part=0))]
    fn tensor(&self, rank: usize, part: usize) -> PyResult<Tensor> {
        let found = self.rank(rank)?.parts.get(part);
        let found = found.and_then(|(part, place)| Some((part, place.clone()?)));
        let (used, place) =
            found.ok_or_else(|| Failure::Invalid(format!("part: FFN rank {rank}'s reply has no part {part}")))?;
        Ok(Tensor::of_part(used, place, false)?)
    }

    /// The application's 16 bytes of one FFN instance's reply.
    #[pyo3(signature = (rank=0))]
    fn app<'py>(&self, py: Python<'py>, rank: usize) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.rank(rank)?.app))
    }

    /// Where the time went between this side and one FFN instance, in nanoseconds.
    #[pyo3(signature = (rank=0))]
    fn trace<'py>(&self, py: Python<'py>, rank: usize) -> PyResult<Bound<'py, PyDict>> {
        event::trace(py, &self.rank(rank)?.trace)
    }
}

#[pymethods]
impl AttentionMesh {
    #[new]
    fn new(py: Python<'_>, options: Options) -> PyResult<Self> {
        let (attention, waker) = join(py, options, None)?;
        Ok(Self { shared: Shared::new(attention, waker) })
    }

    /// This instance's rank.
    #[getter]
    fn rank(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.shared.with(py, |attention| Ok(attention.rank))?)
    }

    /// FFN instances of the deployment.
    #[getter]
    fn ffn(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.shared.with(py, |attention| Ok(attention.ffn))?)
    }

    /// All ranks are held and all links are up.
    #[getter]
    fn complete(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.shared.with(py, |attention| Ok(attention.is_complete()))?)
    }

    /// Waits until the whole deployment is there.
    #[pyo3(signature = (timeout=Some(30.0)))]
    fn wait_complete(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        let timeout = seconds(timeout)?;
        let complete = self.shared.wait(py, timeout, |attention| {
            attention
                .is_complete()
                .then_some(Ok(()))
                .or_else(|| attention.news.scheduler_lost().map(|error| Err(error.into())))
        })?;
        Ok(complete.ok_or(Failure::Mesh(MeshError::Timeout(timeout)))?)
    }

    /// The send slot of a microbatch, to be filled in place. `WouldBlock` while it is in use, after `timeout` seconds;
    /// `NotLinked` while an FFN instance is missing.
    #[pyo3(signature = (microbatch=0, timeout=Some(0.0)))]
    fn acquire(&self, py: Python<'_>, microbatch: u16, timeout: Option<f64>) -> PyResult<SendBuffer> {
        let timeout = seconds(timeout)?;
        let mut busy = MeshError::WouldBlock(microbatch);
        let buffer = self.shared.wait(py, timeout, |attention| match attention.acquire(microbatch) {
            Ok(buffer) => Some(Ok(buffer)),
            Err(error @ (MeshError::WouldBlock(_) | MeshError::NotLinked(_))) => {
                busy = error;
                None
            }
            Err(error) => Some(Err(error.into())),
        })?;
        let buffer = buffer.ok_or(Failure::Mesh(busy))?;
        Ok(SendBuffer { buffer: Mutex::new(Some(buffer)), microbatch })
    }

    /// Where a request part is produced, whoever has its slot now: for work that is captured ahead.
    #[pyo3(signature = (microbatch, part=0, shape=None, dtype=None))]
    fn request_tensor(
        &self,
        py: Python<'_>,
        microbatch: u16,
        part: usize,
        shape: Option<Vec<usize>>,
        dtype: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Tensor> {
        let place = self.shared.with(py, |attention| Ok(attention.driven()?.request_place(microbatch, part)))?;
        Ok(Tensor::at(place, dtype, shape)?)
    }

    /// Where an FFN instance's reply part lands, as `request_tensor`.
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
        let place = self.shared.with(py, |attention| Ok(attention.driven()?.reply_place(rank, microbatch, part)))?;
        Ok(Tensor::at(place, dtype, shape)?)
    }

    /// Sends an acquired slot to every FFN instance; the ticket stands for all their replies. A request that is refused
    /// gives the slot back. Without a group it is one more than the microbatch's last without.
    #[pyo3(signature = (buffer, parts, group=Some(0), app=None, leave=false))]
    fn push_pull(
        &self,
        py: Python<'_>,
        buffer: &Bound<'_, SendBuffer>,
        parts: &Bound<'_, PyAny>,
        group: Option<u32>,
        app: Option<&[u8]>,
        leave: bool,
    ) -> PyResult<Ticket> {
        let parts = Parts::read(parts)?;
        let app = app.map_or(Ok([0; 16]), self::app)?;
        let microbatch = buffer.get().microbatch;
        let buffer = buffer.get().take()?;
        let ticket = self.shared.with(py, |attention| {
            let group = group.unwrap_or_else(|| attention.next_group(microbatch));
            let request = Request { group, app, parts: parts.in_use(), leave };
            Ok(attention.push_pull(buffer, request)?)
        })?;
        Ok(Ticket { ticket, mesh: self.shared.number() })
    }

    /// Waits for all replies to a request, and consumes the ticket. `Timeout` leaves it outstanding.
    #[pyo3(signature = (ticket, timeout=Some(10.0)))]
    fn wait(&self, py: Python<'_>, ticket: &Bound<'_, Ticket>, timeout: Option<f64>) -> PyResult<Reply> {
        let timeout = seconds(timeout)?;
        let ticket = self.ticket(ticket)?;
        let ranks = self.shared.wait(py, timeout, |attention| {
            attention.is_over(ticket).then(|| attention.take(ticket).map_err(Failure::from))
        })?;
        let ranks = ranks.ok_or(Failure::Mesh(MeshError::Timeout(timeout)))?;
        Ok(Reply { ranks })
    }

    /// Makes progress; whether `wait` would return at once.
    fn test(&self, py: Python<'_>, ticket: &Bound<'_, Ticket>) -> PyResult<bool> {
        let ticket = self.ticket(ticket)?;
        let over = self.shared.wait(py, Duration::ZERO, |attention| attention.is_over(ticket).then_some(Ok(true)))?;
        Ok(over.unwrap_or(false))
    }

    /// Gives a ticket up: FFN instances that have not replied are fenced off, and their links come back.
    fn cancel(&self, py: Python<'_>, ticket: &Bound<'_, Ticket>) -> PyResult<()> {
        let ticket = self.ticket(ticket)?;
        Ok(self.shared.with(py, |attention| Ok(attention.cancel(ticket)?))?)
    }

    /// Tells the FFN instances not to wait for this instance on a microbatch until its next request.
    fn leave(&self, py: Python<'_>, microbatch: u16) -> PyResult<()> {
        Ok(self.shared.with(py, |attention| Ok(attention.leave(microbatch)?))?)
    }

    /// Makes progress without waiting.
    fn poll(&self, py: Python<'_>) -> PyResult<()> {
        Ok(self.shared.poll(py)?)
    }

    /// The next event as a dict, or None after `timeout` seconds.
    #[pyo3(signature = (timeout=Some(0.0)))]
    fn next_event<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let event = self.shared.wait(py, seconds(timeout)?, |attention| attention.news.next().map(Ok))?;
        event.map(|event| event::to_dict(py, &event)).transpose()
    }

    /// Waits until every member of the group has come to the barrier of this name as often as this one has.
    #[pyo3(signature = (name="barrier", group="all", timeout=Some(60.0)))]
    fn barrier(&self, py: Python<'_>, name: &str, group: &str, timeout: Option<f64>) -> PyResult<()> {
        let (timeout, group) = (seconds(timeout)?, barrier_group(group)?);
        let barrier = self.shared.with(py, |attention| {
            let (barrier, message) = attention.news.enter(name, group);
            attention.send_control(message)?;
            Ok(barrier)
        })?;
        let met = self.shared.wait(py, timeout, |attention| attention.news.released(&barrier))?;
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

impl AttentionMesh {
    fn ticket(&self, ticket: &Bound<'_, Ticket>) -> Result<MeshTicket, Failure> {
        let ticket = ticket.get();
        if ticket.mesh != self.shared.number() {
            return Err(Failure::Unknown("ticket: it is another mesh's".to_owned()));
        }
        Ok(ticket.ticket)
    }
}
