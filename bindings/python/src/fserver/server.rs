//! The FFN side: `get_batch` hands out one request of every worker, in the order that each sent them; `respond` answers
//! one.

use super::copies::{Copies, Piece};
use super::inbox::{Handed, Inbox, Incoming, Leaving, Peer};
use super::worker::{keys, tensors};
use super::{layout, now_ns};
use crate::attention::barrier_group;
use crate::error::Failure;
use crate::options::Options;
use crate::shared::{Shared, seconds};
use crate::tensor::Tensor;
use crate::view::{View, view_near};
use crate::{dtype, ffn};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::collections::hash_map::{self, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use stepmesh_embed::{Entry, List, Stamp};
use stepmesh_mesh::Segment;
use stepmesh_transport::{copy_for_peer, copy_from_peer};

/// Shapes of one key whose tensors are kept.
const SHAPES: usize = 8;
/// How long `get_batch` waits before it says once more that all workers have stopped.
const REST: Duration = Duration::from_millis(20);
/// How long a GPU may take to copy a batch: behind nothing else, it takes microseconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A tensor that a key's pushes are copied to.
struct Landing {
    shape: Vec<u32>,
    dtype: stepmesh_proto::Dtype,
    tensor: Py<PyAny>,
    view: View,
}

/// A worker's share of a buffer of the program's.
struct Registered {
    tensor: Py<PyAny>,
    offset: usize,
}

/// An FFN instance as StepMesh knows it.
#[pyclass(frozen, module = "stepmesh._native")]
pub(crate) struct Server {
    shared: Arc<Shared<Inbox>>,
    /// `new(dtype, shape)` makes a tensor; `part(tensor, offset, bytes, dtype, shape)` is a view of another one's bytes.
    new: Py<PyAny>,
    part: Py<PyAny>,
    /// Makes a tensor of the program's kind of a slot's, for `in_place`.
    wrap: Py<PyAny>,
    in_place: bool,
    landings: Mutex<HashMap<(usize, u64), VecDeque<Landing>>>,
    registered: Mutex<HashMap<(usize, u64), Registered>>,
    /// Where tensors may be.
    gpu: Option<u32>,
    /// The gate of what `get_batch` copies.
    gate: usize,
    slots: usize,
}

#[pymethods]
impl Server {
    #[new]
    #[allow(clippy::too_many_arguments, reason = "one caller, fserver_lib")]
    fn new(
        py: Python<'_>,
        options: Options,
        slots: u16,
        slot_bytes: usize,
        new: Py<PyAny>,
        part: Py<PyAny>,
        wrap: Py<PyAny>,
        in_place: bool,
    ) -> PyResult<Self> {
        let (layout, gpu) = (layout(slots, slot_bytes)?, options.gpu);
        let (ffn, waker) = ffn::join(py, options, Some(layout))?;
        let gate = ffn.attention * usize::from(slots);
        let copies = gpu.map(|gpu| Copies::new(gpu, gate + 1)).transpose()?;
        let inner = Inbox {
            peers: (0..ffn.attention).map(|_| Peer::default()).collect(),
            ffn,
            copies,
            leaving: Vec::new(),
            let_go: Vec::new(),
            handed: FxHashMap::default(),
            next_handler: 1,
            registered: HashMap::new(),
            table: Vec::new(),
        };
        let shared = Shared::new(inner, waker);
        let (landings, registered) = (Mutex::default(), Mutex::default());
        Ok(Self { shared, new, part, wrap, in_place, landings, registered, gpu, gate, slots: usize::from(slots) })
    }

    fn wait_complete(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let timeout = seconds(Some(timeout))?;
        let complete = self.shared.wait(py, timeout, |inner| {
            let lost = || inner.ffn.news.scheduler_lost();
            inner.ffn.is_complete().then_some(Ok(())).or_else(|| Some(Err(lost()?.into())))
        })?;
        Ok(complete.ok_or_else(|| Failure::Timeout(format!("the deployment was not complete after {timeout:?}")))?)
    }

    /// The i-th equal share of `tensor` receives what worker `worker_ranks[i]` pushes under `push_keys[i]`.
    fn register_recv_buffer(
        &self,
        py: Python<'_>,
        tensor: &Bound<'_, PyAny>,
        worker_ranks: Vec<usize>,
        push_keys: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let whole = view_near(tensor, true, self.gpu, &|| "tensor".to_owned())?;
        let push_keys = keys(push_keys, "push_keys")?;
        let shares = worker_ranks.len();
        if shares == 0 || shares != push_keys.len() {
            let why = format!("push_keys: {} keys for {shares} worker ranks", push_keys.len());
            return Err(Failure::Invalid(why).into());
        }
        if !whole.bytes.is_multiple_of(shares) {
            let why = format!("tensor: {} bytes cannot be split into {shares} equal shares", whole.bytes);
            return Err(Failure::Invalid(why).into());
        }
        let share = whole.bytes / shares;
        let workers = self.shared.with(py, |inner| Ok(inner.peers.len()))?;
        if let Some(rank) = worker_ranks.iter().find(|&&rank| rank >= workers) {
            return Err(Failure::Invalid(format!("worker_ranks: {rank}, and there are {workers} workers")).into());
        }
        let places: Vec<_> = worker_ranks.into_iter().zip(push_keys).collect();
        self.shared.with(py, |inner| {
            inner.registered.extend(places.iter().map(|place| (*place, share)));
            Ok(())
        })?;
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        let mut landings = self.landings.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, place) in places.into_iter().enumerate() {
            landings.remove(&place);
            registered.insert(place, Registered { tensor: tensor.clone().unbind(), offset: index * share });
        }
        Ok(())
    }

    /// One entry for every worker, by rank: (handler, tensors, keys). Empty when all have stopped. None after `timeout`.
    #[pyo3(signature = (timeout))]
    fn get_batch<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Option<Bound<'py, PyList>>> {
        let batch = self.shared.wait(py, seconds(timeout)?, |inner| inner.next())?;
        let Some(batch) = batch else { return Ok(None) };
        if batch.is_empty() {
            crate::process::detached(py, || std::thread::sleep(REST));
        }
        let mut entries = Vec::with_capacity(batch.len());
        let mut pieces = Vec::new();
        let mut batch = VecDeque::from(batch);
        while let Some(incoming) = batch.pop_front() {
            match self.hand_out(py, incoming, &mut pieces) {
                Ok(entry) => entries.push(entry),
                Err((incoming, error)) => {
                    // Nobody will ever see these requests: their senders are told.
                    batch.extend(incoming.map(|incoming| *incoming));
                    self.shared.with(py, |inner| {
                        for incoming in batch {
                            let why = "the server could not take the tensors in".to_owned();
                            inner.answer(incoming.batch, Stamp::default(), Err(why), 0)?;
                        }
                        Ok(())
                    })?;
                    return Err(error);
                }
            }
        }
        if self.gpu.is_some() {
            self.bring(py, &pieces)?;
        }
        PyList::new(py, entries).map(Some)
    }

    /// One tensor for each pull of a request. What is on a GPU is copied behind what is on `stream`, if one is given, and sent
    /// when that is done.
    #[pyo3(signature = (given, handler, stream=None))]
    fn respond(&self, py: Python<'_>, given: &Bound<'_, PyAny>, handler: u64, stream: Option<usize>) -> PyResult<()> {
        let views = tensors(given, false, self.gpu, "tensors")?;
        let rows: Vec<_> = views.iter().map(|view| (view, view.bytes, view.shape().to_vec())).collect();
        Ok(self.answer(py, &rows, handler, stream)?)
    }

    /// To each handler the first rows of `ret_buffer`, as many as its tensor in `tensors_vec` has.
    #[pyo3(signature = (ret_buffer, tensors_vec, handler_vec, stream=None))]
    fn respond_vec(
        &self,
        py: Python<'_>,
        ret_buffer: &Bound<'_, PyAny>,
        tensors_vec: &Bound<'_, PyAny>,
        handler_vec: Vec<u64>,
        stream: Option<usize>,
    ) -> PyResult<()> {
        let buffer = view_near(ret_buffer, false, self.gpu, &|| "ret_buffer".to_owned())?;
        let Some((&most, row)) = buffer.shape().split_first() else {
            return Err(Failure::Invalid("ret_buffer: a tensor with rows is wanted".to_owned()).into());
        };
        let mut rows = Vec::new();
        for (index, tensor) in tensors_vec.try_iter()?.enumerate() {
            let tensor = tensor?;
            let tensor = if let Ok(list) = tensor.cast::<PyList>() { list.get_item(0)? } else { tensor };
            let size = tensor.getattr("shape")?.get_item(0)?.extract::<usize>()?;
            if size > most {
                let why = format!("tensors_vec[{index}]: {size} rows, and ret_buffer has {most}");
                return Err(Failure::Invalid(why).into());
            }
            rows.push(size);
        }
        if rows.len() != handler_vec.len() {
            let why = format!("handler_vec: {} handlers for {} tensors", handler_vec.len(), rows.len());
            return Err(Failure::Invalid(why).into());
        }
        let row_bytes = row.iter().product::<usize>() * buffer.dtype.bytes();
        for (rows, handler) in rows.into_iter().zip(handler_vec) {
            let shape = std::iter::once(rows).chain(row.iter().copied()).collect();
            self.answer(py, &[(&buffer, rows * row_bytes, shape)], handler, stream)?;
        }
        Ok(())
    }

    /// Tensors in a request's reply slot, one for each pull, to be filled and given to `respond`.
    fn reply_buffers(&self, py: Python<'_>, handler: u64) -> PyResult<Vec<Tensor>> {
        let (place, pulls) = self.shared.with(py, |inner| {
            let handed = inner.handed.get(&handler).ok_or_else(|| unknown(handler))?;
            Ok((handed.batch.segments[0].reply_place(1), handed.pulls.clone()))
        })?;
        let (region, place) = place.ok_or_else(|| unknown(handler))?;
        let mut list = List::default();
        let tensor = |mut pull: Entry| {
            let start = place.start + list.place(&mut pull);
            let shape = pull.shape().iter().map(|&size| size as usize).collect();
            Tensor::new((region.clone(), start..start + pull.bytes as usize), pull.dtype, Some(shape), false)
        };
        Ok(pulls.into_iter().map(tensor).collect::<Result<_, _>>()?)
    }

    fn barrier(&self, py: Python<'_>, name: &str, group: &str, timeout: f64) -> PyResult<()> {
        let (timeout, group) = (seconds(Some(timeout))?, barrier_group(group)?);
        let barrier = self.shared.with(py, |inner| {
            let (barrier, message) = inner.ffn.news.enter(name, group);
            inner.ffn.send_control(message)?;
            Ok(barrier)
        })?;
        let met = self.shared.wait(py, timeout, |inner| inner.ffn.news.released(&barrier))?;
        Ok(met.ok_or_else(|| Failure::Timeout(format!("barrier `{name}`: somebody is missing after {timeout:?}")))?)
    }

    fn close(&self, py: Python<'_>) {
        self.shared.close(py);
    }
}

fn unknown(handler: u64) -> Failure {
    Failure::Unknown(format!("handler: {handler} is unknown, or was answered already"))
}

impl Server {
    /// Has the copy engines bring the tensors of a batch, and waits for them.
    fn bring(&self, py: Python<'_>, pieces: &[Piece]) -> Result<(), Failure> {
        let let_go = self.shared.with(py, |inner| {
            if let Some(copies) = inner.copies.as_mut().filter(|_| !pieces.is_empty()) {
                // SAFETY: the slots are pinned, and kept until they are answered; the landings are this GPU's, and kept.
                unsafe { copies.start(None, self.gate, pieces)? };
            }
            Ok(std::mem::take(&mut inner.let_go))
        })?;
        drop(let_go);
        if pieces.is_empty() {
            return Ok(());
        }
        let brought = self.shared.wait(py, PATIENCE, |inner| {
            inner.copies.as_mut().is_none_or(|copies| copies.take(self.gate)).then_some(Ok(()))
        })?;
        brought.ok_or_else(|| Failure::Timeout(format!("the GPU has not copied a batch after {PATIENCE:?}")))
    }

    /// Gives a request to the program; if that fails, back.
    fn hand_out<'py>(
        &self,
        py: Python<'py>,
        incoming: Incoming,
        pieces: &mut Vec<Piece>,
    ) -> Result<Bound<'py, PyTuple>, (Option<Box<Incoming>>, PyErr)> {
        let segment = &incoming.batch.segments[0];
        let mut copied_bytes = 0;
        let (mut tensors, mut keys) = (Vec::new(), Vec::new());
        for push in &incoming.request.pushes {
            match self.tensor(py, segment, incoming.rank, push, pieces) {
                Ok((tensor, copied)) => {
                    tensors.push(tensor);
                    copied_bytes += copied;
                    keys.push(push.key);
                }
                Err(error) => return Err((Some(Box::new(incoming)), error)),
            }
        }
        let Incoming { batch, request, received_ns, .. } = incoming;
        let servers = usize::from(request.servers.max(1));
        let handed = self.shared.with(py, move |inner| {
            let share = request.pulls.len() / servers;
            let first = share * inner.ffn.rank as usize;
            let pulls = request.pulls.get(first..first + share).unwrap_or_default().to_vec();
            let handler = inner.next_handler;
            inner.next_handler += 1;
            let stamp = Stamp { received_ns, process_ns: now_ns(), copied_bytes, ..Stamp::default() };
            inner.handed.insert(handler, Handed { batch, pulls, stamp });
            Ok(handler)
        });
        let entry = handed.map_err(PyErr::from).and_then(|handler| {
            let parts = (handler, PyList::new(py, tensors)?, PyList::new(py, keys)?);
            parts.into_pyobject(py)
        });
        // By now its batch is with the mesh, or gone with it.
        entry.map_err(|error| (None, error))
    }

    /// What was pushed, as a tensor of the program's kind, and the bytes that this took to be copied.
    fn tensor(
        &self,
        py: Python<'_>,
        segment: &Segment,
        rank: usize,
        push: &Entry,
        pieces: &mut Vec<Piece>,
    ) -> PyResult<(Py<PyAny>, u64)> {
        let place = (rank, push.key);
        let name = dtype::name(push.dtype);
        let shape = || PyTuple::new(py, push.shape());
        if self.in_place && !self.is_registered(&place) {
            let (region, part) = segment.part_place(1).ok_or_else(|| Failure::Invalid("no tensors came".into()))?;
            let start = part.start + push.offset as usize;
            let sizes = push.shape().iter().map(|&size| size as usize).collect();
            let tensor = Tensor::new((region, start..start + push.bytes as usize), push.dtype, Some(sizes), false)?;
            return Ok((self.wrap.call1(py, (tensor,))?, 0));
        }
        let mut landings = self.landings.lock().unwrap_or_else(PoisonError::into_inner);
        let known = landings.entry(place).or_default();
        let found = known.iter().position(|landing| landing.dtype == push.dtype && landing.shape == push.shape());
        let index = match found {
            Some(index) => index,
            None => {
                let registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
                let tensor = match registered.get(&place) {
                    Some(Registered { tensor, offset }) => {
                        self.part.call1(py, (tensor, *offset, push.bytes, name, shape()?))?
                    }
                    None => self.new.call1(py, (name, shape()?))?,
                };
                let view = view_near(tensor.bind(py), true, self.gpu, &|| "tensor".to_owned())?;
                if view.bytes != push.bytes as usize {
                    return Err(Failure::Invalid("a tensor of another size was made".to_owned()).into());
                }
                if known.len() == SHAPES {
                    known.pop_front();
                }
                known.push_back(Landing { shape: push.shape().to_vec(), dtype: push.dtype, tensor, view });
                known.len() - 1
            }
        };
        let landing = &known[index];
        let from = &segment.part(1)[push.offset as usize..][..push.bytes as usize];
        if landing.view.gpu.is_some() && !from.is_empty() {
            let (slot, _) = segment.part_place(1).ok_or_else(|| Failure::Invalid("no tensors came".into()))?;
            pieces.push(Piece { slot, from: from.as_ptr() as usize, to: landing.view.address, bytes: from.len() });
        } else if !from.is_empty() {
            // SAFETY: the view is held, writable and of this many bytes, and no slot.
            unsafe { copy_from_peer(from.as_ptr(), landing.view.address as *mut u8, from.len()) };
        }
        Ok((landing.tensor.clone_ref(py), u64::from(push.bytes)))
    }

    fn is_registered(&self, place: &(usize, u64)) -> bool {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner).contains_key(place)
    }

    /// Answers with these tensors: their bytes, as many as are wanted, and the shape to say.
    fn answer(
        &self,
        py: Python<'_>,
        given: &[(&View, usize, Vec<usize>)],
        handler: u64,
        stream: Option<usize>,
    ) -> Result<(), Failure> {
        let respond_ns = now_ns();
        let on_gpu = given.iter().filter(|(view, ..)| view.gpu.is_some());
        let mut keepers: Vec<_> = on_gpu.filter_map(|(view, ..)| view.keeper(py)).collect();
        self.shared.with(py, |inner| {
            let hash_map::Entry::Occupied(found) = inner.handed.entry(handler) else { return Err(unknown(handler)) };
            let handed = found.get();
            if handed.pulls.len() != given.len() {
                return Err(Failure::Invalid(format!(
                    "tensors: {} for {} pulls of handler {handler}",
                    given.len(),
                    handed.pulls.len()
                )));
            }
            for (index, (pull, (view, bytes, _))) in handed.pulls.iter().zip(given).enumerate() {
                if view.dtype != pull.dtype {
                    return Err(Failure::Type(format!(
                        "tensors[{index}]: {} for key {}, whose pull tensor is {}",
                        dtype::name(view.dtype),
                        pull.key,
                        dtype::name(pull.dtype)
                    )));
                }
                if *bytes > pull.bytes as usize {
                    return Err(Failure::Invalid(format!(
                        "tensors[{index}]: {bytes} bytes for key {}, whose pull tensor has {}",
                        pull.key, pull.bytes
                    )));
                }
            }
            let Handed { mut batch, pulls, mut stamp } = found.remove();
            let mut list = List::default();
            let mut entries = Vec::with_capacity(pulls.len());
            let mut pieces = Vec::new();
            let place = batch.segments[0].reply_place(1);
            let room = batch.segments[0].reply_mut(1);
            for (mut pull, (view, bytes, shape)) in pulls.into_iter().zip(given) {
                let offset = list.place(&mut pull);
                let to = &mut room[offset..][..*bytes];
                if let (Some((slot, _)), Some(_)) = (&place, view.gpu.filter(|_| !to.is_empty())) {
                    let (slot, to) = (slot.clone(), to.as_ptr() as usize);
                    pieces.push(Piece { slot, from: view.address, to, bytes: *bytes });
                    stamp.copied_bytes += *bytes as u64;
                } else if to.as_ptr() as usize != view.address && !to.is_empty() {
                    // SAFETY: both are valid for the bytes; they may overlap only where the program answers out of
                    // another place of the slot, which `copy` allows.
                    unsafe { copy_for_peer(view.address as *const u8, to.as_mut_ptr(), *bytes) };
                    stamp.copied_bytes += *bytes as u64;
                }
                let entry = Entry::new(pull.key, pull.dtype, shape);
                let mut entry = entry.ok_or_else(|| Failure::Invalid("tensors: too large".to_owned()))?;
                entry.offset = offset as u32;
                entries.push(entry);
            }
            stamp.respond_ns = respond_ns;
            let bytes = list.bytes();
            if let Some(peer) = inner.peers.get_mut(batch.segments[0].rank()) {
                peer.spare.used(place, bytes);
            }
            match &mut inner.copies {
                Some(copies) if !pieces.is_empty() => {
                    let gate = batch.segments[0].rank() * self.slots + usize::from(batch.microbatch);
                    // SAFETY: the tensors are on this GPU and kept with the answer, as the slot is, which is pinned for it.
                    unsafe { copies.start(stream, gate, &pieces)? };
                    let keepers = std::mem::take(&mut keepers);
                    inner.leaving.push(Leaving { gate, batch, stamp, entries, bytes, keepers });
                    Ok(())
                }
                _ => Ok(inner.answer(batch, stamp, Ok(entries), bytes)?),
            }
        })
    }
}
