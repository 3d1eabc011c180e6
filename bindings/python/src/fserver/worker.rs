//! The attention side: `push_pull` → `wait`, any number of requests under way, as many at once on the wire as there are
//! slots.

use super::copies::{Copies, Piece};
use super::flights::{Flight, Flights, REMEMBERED, Stage, Stamps, Trip};
use super::spare::Spare;
use super::{layout, now_ns};
use crate::attention::barrier_group;
use crate::error::Failure;
use crate::options::Options;
use crate::shared::{Shared, seconds};
use crate::tensor::Tensor;
use crate::view::{View, view_near};
use crate::{attention, dtype};
use pyo3::prelude::*;
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use stepmesh_embed::{Entry, List, Request};
use stepmesh_mesh::SendBuffer;
use stepmesh_proto::Dtype;
use stepmesh_transport::copy_for_peer;

/// What a key stands for: the element type and the size of a row. The number of rows may vary.
type Meaning = (Dtype, usize);

/// An attention instance as StepMesh knows it.
#[pyclass(frozen, module = "stepmesh._native")]
pub(crate) struct Worker {
    shared: Arc<Shared<Flights>>,
    servers: usize,
    slot_bytes: usize,
    slot_timeout: Duration,
    keys: Mutex<FxHashMap<(bool, u64), Meaning>>,
    /// Where tensors may be.
    gpu: Option<u32>,
}

#[pymethods]
impl Worker {
    #[new]
    fn new(py: Python<'_>, options: Options, slots: u16, slot_bytes: usize, slot_timeout: f64) -> PyResult<Self> {
        let (layout, gpu) = (layout(slots, slot_bytes)?, options.gpu);
        let copies = gpu.map(|gpu| Copies::new(gpu, usize::from(slots))).transpose()?;
        let (attention, waker) = attention::join(py, options, Some(layout))?;
        let flights = (0..slots).map(|_| None).collect();
        let inner = Flights {
            attention,
            copies,
            flights,
            finished: BTreeMap::new(),
            waited: VecDeque::new(),
            filling: Vec::new(),
            let_go: Vec::new(),
            next_handler: 1,
            sequence: 0,
            table: Vec::new(),
            spare: Spare::default(),
            last: 0,
        };
        let servers = inner.attention.ffn;
        let shared = Shared::new(inner, waker);
        let slot_timeout = seconds(Some(slot_timeout))?;
        Ok(Self { shared, servers, slot_bytes, slot_timeout, keys: Mutex::default(), gpu })
    }

    fn wait_complete(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let timeout = seconds(Some(timeout))?;
        let complete = self.shared.wait(py, timeout, |inner| {
            let lost = || inner.attention.news.scheduler_lost();
            inner.attention.is_complete().then_some(Ok(())).or_else(|| Some(Err(lost()?.into())))
        })?;
        Ok(complete.ok_or_else(|| Failure::Timeout(format!("the deployment was not complete after {timeout:?}")))?)
    }

    /// Sends every push tensor to every server; the handler stands for all that is pulled. What is on a GPU is copied behind what
    /// is on `stream`, if one is given, and sent when that is done.
    #[pyo3(signature = (push_tensors, push_keys, pull_tensors, pull_keys, stream=None))]
    fn push_pull(
        &self,
        py: Python<'_>,
        push_tensors: &Bound<'_, PyAny>,
        push_keys: &Bound<'_, PyAny>,
        pull_tensors: &Bound<'_, PyAny>,
        pull_keys: &Bound<'_, PyAny>,
        stream: Option<usize>,
    ) -> PyResult<u64> {
        let requested_ns = now_ns();
        let pushes = tensors(push_tensors, false, self.gpu, "push_tensors")?;
        let pulls = tensors(pull_tensors, true, self.gpu, "pull_tensors")?;
        let (push_keys, pull_keys) = (keys(push_keys, "push_keys")?, keys(pull_keys, "pull_keys")?);
        for (name, count, keys) in [("push", pushes.len(), push_keys.len()), ("pull", pulls.len(), pull_keys.len())] {
            if count != keys {
                return Err(Failure::Invalid(format!("{name}_keys: {keys} keys for {count} tensors")).into());
            }
        }
        if !pulls.len().is_multiple_of(self.servers) {
            let (pulls, servers) = (pulls.len(), self.servers);
            let why = format!("pull_tensors: {pulls} tensors, and {servers} servers cannot share them equally");
            return Err(Failure::Invalid(why).into());
        }
        let mut request = Request {
            stops: false,
            sequence: 0,
            servers: self.servers as u16,
            pushes: self.entries(&pushes, &push_keys, "push")?,
            pulls: self.entries(&pulls, &pull_keys, "pull")?,
        };
        let mut list = List::default();
        request.pushes.iter_mut().for_each(|entry| {
            list.place(entry);
        });
        self.check_room("push_tensors", list.bytes())?;
        for share in request.pulls.chunks(request.pulls.len().div_ceil(self.servers).max(1)) {
            let mut list = List::default();
            share.iter().for_each(|entry| {
                list.place(&mut entry.clone());
            });
            self.check_room("pull_tensors", list.bytes())?;
        }
        // Refused here, before a slot is taken.
        request.check().map_err(|error| Failure::Invalid(format!("push_tensors: {error}")))?;
        let mut given = Some((request, pushes, pulls));
        let handler = self.shared.wait(py, self.slot_timeout, |inner| {
            let (_, pushes, _) = given.as_ref()?;
            let mut slot = match take_filled(&mut inner.filling, pushes) {
                Some(slot) => slot,
                None => match inner.acquire()? {
                    Ok(slot) => slot,
                    Err(error) => return Some(Err(error)),
                },
            };
            let (mut request, pushes, pulls) = given.take()?;
            let (mut copied_bytes, mut pieces) = (0, Vec::new());
            let place = slot.part_place(1);
            let room = slot.part_mut(1);
            for (entry, push) in request.pushes.iter().zip(&pushes) {
                let to = &mut room[entry.offset as usize..][..push.bytes];
                if let (Some((slot, _)), Some(_)) = (&place, push.gpu.filter(|_| push.bytes > 0)) {
                    let (slot, to) = (slot.clone(), to.as_ptr() as usize);
                    pieces.push(Piece { slot, from: push.address, to, bytes: push.bytes });
                    copied_bytes += push.bytes as u64;
                } else if to.as_ptr() as usize != push.address {
                    // SAFETY: both are valid for their bytes; they may overlap only where the program pushes out of
                    // another place of the slot, which `copy` allows.
                    unsafe { copy_for_peer(push.address as *const u8, to.as_mut_ptr(), push.bytes) };
                    copied_bytes += push.bytes as u64;
                }
            }
            request.sequence = inner.sequence;
            // About to be posted: a server may have answered before the post returns.
            let posted_ns = now_ns();
            let index = usize::from(slot.microbatch());
            let stage = match &mut inner.copies {
                Some(copies) if !pieces.is_empty() => {
                    // SAFETY: the pushes are on this GPU, the slot is pinned for it, and both are kept with the flight.
                    let started = unsafe { copies.start(stream, index, &pieces) };
                    started.map(|()| Stage::Filling(slot, request, list.bytes()))
                }
                _ => inner.send(slot, &request, list.bytes()).map(Stage::UnderWay),
            };
            let stage = match stage {
                Ok(stage) => stage,
                Err(error) => return Some(Err(error)),
            };
            inner.spare.used(place, list.bytes());
            inner.sequence += 1;
            let handler = inner.next_handler;
            let handlers = 1 + (pushes.len() + pulls.len()) as u64;
            inner.next_handler += handlers;
            let trip = Trip { handlers, pushes, pulls, requested_ns, posted_ns, copied_bytes };
            inner.flights[index] = Some((handler, Flight { stage, trip }));
            Some(Ok((handler, std::mem::take(&mut inner.let_go))))
        })?;
        let (handler, let_go) = handler.ok_or_else(|| {
            let timeout = self.slot_timeout;
            Failure::Timeout(format!("all slots were under way for {timeout:?}: the servers do not answer"))
        })?;
        drop(let_go);
        Ok(handler)
    }

    /// Waits until all pulls of a request are in their tensors.
    fn wait(&self, py: Python<'_>, handler: u64, timeout: f64) -> PyResult<()> {
        let timeout = seconds(Some(timeout))?;
        let unknown = || Failure::Unknown(format!("handler: {handler} is unknown, or was waited for already"));
        let ended = self.shared.wait(py, timeout, |inner| {
            if inner.is_outstanding(handler) {
                return None;
            }
            let outcome = inner.finished.get_mut(&handler).and_then(|finished| finished.outcome.take());
            let Some(outcome) = outcome else { return Some(Err(unknown())) };
            inner.waited.push_back(handler);
            if inner.waited.len() > REMEMBERED
                && let Some(oldest) = inner.waited.pop_front()
            {
                inner.finished.remove(&oldest);
            }
            Some(outcome.map(|()| std::mem::take(&mut inner.let_go)))
        })?;
        match ended {
            Some(_let_go) => Ok(()),
            None => Err(Failure::Timeout(format!("handler {handler}: no answer after {timeout:?}")).into()),
        }
    }

    /// The request's handler, then one for each push and each pull.
    fn handlers(&self, py: Python<'_>, handler: u64) -> PyResult<Vec<u64>> {
        let count = self.shared.with(py, |inner| {
            let flight =
                inner.flights.iter().flatten().find(|(id, _)| *id == handler).map(|(_, flight)| flight.trip.handlers);
            Ok(flight.or_else(|| inner.finished.get(&handler).map(|finished| finished.handlers)))
        })?;
        let count = count.ok_or_else(|| Failure::Unknown(format!("handler: {handler} is unknown")))?;
        Ok((handler..handler + count).collect())
    }

    /// Eight stamps of a request that is over, and the bytes that were copied between slots and tensors. A pull's handler
    /// is about its server; the others are about the server that was last to answer.
    fn trace(&self, py: Python<'_>, handler: u64) -> PyResult<(Stamps, u64)> {
        let servers = self.servers;
        let found = self.shared.with(py, |inner| {
            inner.advance();
            let found = inner.finished.range(..=handler).next_back();
            let Some((first, finished)) = found.filter(|(first, finished)| handler - **first < finished.handlers)
            else {
                return Ok(None);
            };
            let at = (handler - first) as usize;
            let last = finished.stamps.iter().enumerate().max_by_key(|(_, stamps)| stamps[5].saturating_sub(stamps[2]));
            let server = match at.checked_sub(1 + finished.pushes) {
                Some(pull) => pull / (finished.pulls / servers).max(1),
                None => last.map_or(0, |(server, _)| server),
            };
            Ok(Some((finished.stamps.get(server).copied().unwrap_or_default(), finished.copied_bytes)))
        })?;
        Ok(found.ok_or_else(|| Failure::Unknown(format!("handler: {handler} is unknown, or not over yet")))?)
    }

    /// Tensors in a free slot, to be filled and given to the next `push_pull` that is to send them, all and in order.
    fn push_buffers(&self, py: Python<'_>, specs: Vec<(Vec<usize>, Bound<'_, PyAny>)>) -> PyResult<Vec<Tensor>> {
        let mut list = List::default();
        let mut wanted = Vec::new();
        for (index, (shape, kind)) in specs.into_iter().enumerate() {
            let dtype = dtype::extract(&kind)?;
            let entry = Entry::new(0, dtype, &shape);
            let mut entry = entry.ok_or_else(|| Failure::Invalid(format!("specs[{index}]: too large")))?;
            wanted.push((list.place(&mut entry), entry.bytes as usize, dtype, shape));
        }
        self.check_room("specs", list.bytes())?;
        let place = self.shared.wait(py, self.slot_timeout, |inner| {
            let slot = match inner.acquire()? {
                Ok(slot) => slot,
                Err(error) => return Some(Err(error)),
            };
            let place = slot.part_place(1);
            inner.filling.push(slot);
            place.map(Ok)
        })?;
        let (region, place) = place.ok_or_else(|| Failure::Timeout("all slots are under way".to_owned()))?;
        let tensor = |(offset, bytes, dtype, shape): (usize, usize, Dtype, Vec<usize>)| {
            let start = place.start + offset;
            Tensor::new((region.clone(), start..start + bytes), dtype, Some(shape), false)
        };
        Ok(wanted.into_iter().map(tensor).collect::<Result<_, _>>()?)
    }

    fn barrier(&self, py: Python<'_>, name: &str, group: &str, timeout: f64) -> PyResult<()> {
        let (timeout, group) = (seconds(Some(timeout))?, barrier_group(group)?);
        let barrier = self.shared.with(py, |inner| {
            let (barrier, message) = inner.attention.news.enter(name, group);
            inner.attention.send_control(message)?;
            Ok(barrier)
        })?;
        let met = self.shared.wait(py, timeout, |inner| inner.attention.news.released(&barrier))?;
        Ok(met.ok_or_else(|| Failure::Timeout(format!("barrier `{name}`: somebody is missing after {timeout:?}")))?)
    }

    /// Tells the servers that no more requests come, and waits for those that are under way.
    fn say_stop(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let timeout = seconds(Some(timeout))?;
        let mut farewell = None;
        let said = self.shared.wait(py, timeout, |inner| {
            let ticket = match farewell {
                Some(ticket) => ticket,
                None => {
                    let slot = match inner.acquire()? {
                        Ok(slot) => slot,
                        Err(error) => return Some(Err(error)),
                    };
                    let request = Request { stops: true, sequence: inner.sequence, ..Request::default() };
                    match inner.send(slot, &request, 0) {
                        Ok(ticket) => *farewell.insert(ticket),
                        Err(error) => return Some(Err(error)),
                    }
                }
            };
            let over = inner.attention.is_over(ticket) && inner.flights.iter().all(Option::is_none);
            over.then(|| inner.attention.take(ticket).map(drop).map_err(Failure::from))
        })?;
        Ok(said.ok_or_else(|| Failure::Timeout(format!("the servers do not answer after {timeout:?}")))?)
    }

    fn close(&self, py: Python<'_>) {
        self.shared.close(py);
    }
}

impl Worker {
    fn check_room(&self, name: &str, bytes: usize) -> Result<(), Failure> {
        if bytes <= self.slot_bytes {
            return Ok(());
        }
        Err(Failure::Invalid(format!(
            "{name}: the tensors take {bytes} bytes and a slot holds {}: raise STEPMESH_SLOT_BYTES, in all processes",
            self.slot_bytes
        )))
    }

    /// The table's entries; a key that has stood for other rows is refused.
    fn entries(&self, views: &[View], keys: &[u64], kind: &str) -> Result<Vec<Entry>, Failure> {
        let mut known = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Vec::with_capacity(views.len());
        let mut fresh = false;
        for (index, (view, &key)) in views.iter().zip(keys).enumerate() {
            if keys[..index].contains(&key) {
                return Err(Failure::Invalid(format!("{kind}_keys[{index}]: key {key} is there twice")));
            }
            let row_bytes = view.shape().iter().skip(1).product::<usize>() * view.dtype.bytes();
            let meaning = (view.dtype, row_bytes);
            let (dtype, expected) = known.get(&(kind == "push", key)).copied().unwrap_or_else(|| {
                fresh = true;
                meaning
            });
            if (dtype, expected) != meaning {
                return Err(Failure::Invalid(format!(
                    "{kind}_keys[{index}]: key {key} stands for rows of {expected} bytes of {}, not of {row_bytes} bytes \
                     of {}: only the number of rows may vary",
                    dtype::name(dtype),
                    dtype::name(view.dtype)
                )));
            }
            let entry = Entry::new(key, view.dtype, view.shape());
            entries.push(entry.ok_or_else(|| Failure::Invalid(format!("{kind}_tensors[{index}]: too large")))?);
        }
        for (view, &key) in views.iter().zip(keys).filter(|_| fresh) {
            let row_bytes = view.shape().iter().skip(1).product::<usize>() * view.dtype.bytes();
            known.insert((kind == "push", key), (view.dtype, row_bytes));
        }
        Ok(entries)
    }
}

/// The slot that the tensors lie in, if one was asked for.
fn take_filled(filling: &mut Vec<SendBuffer>, pushes: &[View]) -> Option<SendBuffer> {
    let first = pushes.first()?.address;
    let at = filling.iter_mut().position(|slot| slot.part_mut(1).as_ptr_range().contains(&(first as *const u8)))?;
    Some(filling.swap_remove(at))
}

/// Tensors of a list, as they are named.
pub(super) fn tensors(
    given: &Bound<'_, PyAny>,
    writable: bool,
    gpu: Option<u32>,
    name: &str,
) -> Result<Vec<View>, Failure> {
    let mut views = Vec::new();
    for tensor in given.try_iter()? {
        let index = views.len();
        views.push(view_near(&tensor?, writable, gpu, &|| format!("{name}[{index}]"))?);
    }
    Ok(views)
}

/// Keys of any iterable of integers.
pub(super) fn keys(given: &Bound<'_, PyAny>, name: &str) -> Result<Vec<u64>, Failure> {
    let mut keys = Vec::new();
    for key in given.try_iter()? {
        let key = key?.extract();
        keys.push(
            key.map_err(|_| Failure::Type(format!("{name}[{}]: a key is an integer from 0 to 2^64 - 1", keys.len())))?,
        );
    }
    Ok(keys)
}
