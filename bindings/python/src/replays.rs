//! Captured steps. While a stream is captured, transfers are recorded and their gates put on it; when the graph is launched, a
//! thread of the runtime's sends what the stream announces and lets it go on when the answers are here. The program only
//! launches its graph.
//!
//! All graphs of a member share the gates of their transfers, for a stream runs one graph after the other. Each has one more,
//! which it announces at first: so the thread knows which of them runs.

use crate::attention::AttentionMesh;
use crate::error::Failure;
use crate::ffn::FfnMesh;
use crate::member::{Attention, Ffn};
use crate::part::{Part, Parts, app};
use crate::process::{self, Open};
use crate::shared::{Shared, seconds};
use crate::streams::Streams;
use pyo3::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use stepmesh_embed::Driven;
use stepmesh_mesh::{AttentionStep, Batch, FfnStep, FfnWork, MeshError, Segment, Transfer};
use stepmesh_proto::Part as MeshPart;
use stepmesh_transport::cuda::{Context, Gates};
use stepmesh_transport::{Clock, GateSet, TransportError};

/// Turns between two looks at the clock.
const TURNS: u32 = 64;
/// Between two looks at whether a graph has begun, after the time that the thread spins.
const NAP: Duration = Duration::from_micros(50);

/// What differs between the two sides.
trait Side: Driven + Send + 'static {
    /// One transfer of a graph.
    type Record: Clone + Send + 'static;
    /// A graph's transfers.
    type Step;

    fn step(gates: Arc<dyn GateSet>, records: Vec<Self::Record>) -> Result<Self::Step, MeshError>;
    fn begin(&mut self, step: &mut Self::Step) -> Result<(), Failure>;
    fn turn(&mut self, step: &mut Self::Step) -> Result<bool, Failure>;
    fn give_up(&mut self, step: &mut Self::Step);
}

impl Side for Attention {
    type Record = Transfer;
    type Step = AttentionStep;

    fn step(gates: Arc<dyn GateSet>, records: Vec<Transfer>) -> Result<AttentionStep, MeshError> {
        AttentionStep::new(gates, records)
    }

    fn begin(&mut self, step: &mut AttentionStep) -> Result<(), Failure> {
        Ok(step.begin(|transfer| self.next_group(transfer.microbatch))?)
    }

    fn turn(&mut self, step: &mut AttentionStep) -> Result<bool, Failure> {
        Ok(step.turn(self.driven()?)?)
    }

    fn give_up(&mut self, step: &mut AttentionStep) {
        if let Ok(mesh) = self.driven() {
            step.give_up(mesh);
        }
    }
}

/// The requests of a transfer, and what is answered, by attention rank: none of those whom another FFN instance answers.
#[derive(Clone)]
struct Awaited {
    microbatch: u16,
    requests: Vec<Option<Vec<MeshPart>>>,
    replies: Vec<Option<Vec<MeshPart>>>,
}

/// The records of a step, for what comes.
struct Captured(Vec<Awaited>);

impl FfnWork for Captured {
    fn arrived(&mut self, transfer: usize, batch: &Batch) -> Result<(), MeshError> {
        let Awaited { microbatch, requests, .. } = &self.0[transfer];
        let wrong = |what: String| Err(MeshError::Transfer(format!("stage {microbatch} of a captured step: {what}")));
        for (rank, request) in requests.iter().enumerate() {
            let Some(request) = request else { continue };
            let Some(segment) = batch.segments.iter().find(|segment| segment.rank() == rank) else {
                return wrong(format!("attention {rank} has sent nothing, or is gone"));
            };
            let mut sent = segment.parts().iter();
            for wanted in request {
                let is_it = |part: &MeshPart| {
                    (part.rows, part.row_bytes, part.dtype) == (wanted.rows, wanted.row_bytes, wanted.dtype)
                };
                match sent.next() {
                    Some(part) if is_it(part) => {}
                    Some(part) => {
                        let (part, wanted) = (Part::of(part).__repr__(), Part::of(wanted).__repr__());
                        return wrong(format!("attention {rank} sent {part}, and the graph takes {wanted}"));
                    }
                    None => return wrong(format!("attention {rank} sent fewer tensors than the graph takes")),
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self, transfer: usize, segment: &mut Segment) -> Result<(), MeshError> {
        let reply = self.0[transfer].replies.get(segment.rank()).and_then(Option::as_ref);
        segment.set_reply(reply.map_or(&[], Vec::as_slice))
    }
}

impl Side for Ffn {
    type Record = Awaited;
    type Step = (FfnStep, Captured);

    fn step(gates: Arc<dyn GateSet>, records: Vec<Awaited>) -> Result<(FfnStep, Captured), MeshError> {
        let microbatches = records.iter().map(|record| record.microbatch).collect();
        Ok((FfnStep::new(gates, microbatches)?, Captured(records)))
    }

    fn begin(&mut self, (step, _): &mut (FfnStep, Captured)) -> Result<(), Failure> {
        Ok(step.begin(self.driven()?)?)
    }

    fn turn(&mut self, (step, work): &mut (FfnStep, Captured)) -> Result<bool, Failure> {
        Ok(step.turn(self.driven()?, work)?)
    }

    fn give_up(&mut self, (step, _): &mut (FfnStep, Captured)) {
        step.give_up();
    }
}

/// The transfers of one capture.
struct Graph<R> {
    capture: u64,
    transfers: Vec<R>,
}

/// What the program and the thread share.
struct Core<R> {
    gates: Arc<Gates>,
    streams: Streams,
    /// Gates of transfers; those that say that a graph has begun come after them.
    transfers: usize,
    graphs: Mutex<Vec<Graph<R>>>,
    /// How many graphs there are.
    count: AtomicUsize,
    failure: Mutex<Option<Failure>>,
    timeout: Duration,
    spin: Duration,
    stops: AtomicBool,
}

impl<R: Clone> Core<R> {
    fn capture(&self, stream: usize) -> Result<Option<u64>, Failure> {
        let mut capture = None;
        self.streams.on(stream, |stream| {
            capture = stream.capture()?;
            Ok(())
        })?;
        Ok(capture)
    }

    /// Something with the graph that the stream is captured for; its beginning is announced when it is new.
    fn record<T>(&self, stream: usize, body: impl FnOnce(&mut Vec<R>) -> Result<T, Failure>) -> Result<T, Failure> {
        self.check()?;
        let capture = self.capture(stream)?;
        let capture = capture.ok_or_else(|| Failure::Invalid("stream: it is not being captured".into()))?;
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        if graphs.last().is_none_or(|graph| graph.capture != capture) {
            let begun = self.gates.gate(self.transfers + graphs.len()).ok_or_else(|| {
                let most = self.gates.len() - self.transfers;
                Failure::Invalid(format!("graphs: {most} have been captured, and no more are provided for"))
            })?;
            self.streams.on(stream, |stream| begun.announce(stream))?;
            graphs.push(Graph { capture, transfers: Vec::new() });
            self.count.store(graphs.len(), Ordering::Release);
        }
        let graph = graphs.last_mut().ok_or_else(|| Failure::Invalid("stream: no capture".into()))?;
        body(&mut graph.transfers)
    }

    /// The number of the next transfer, if there is a gate for it.
    fn next(&self, transfers: &[R]) -> Result<usize, Failure> {
        if transfers.len() < self.transfers {
            return Ok(transfers.len());
        }
        let most = self.transfers;
        Err(Failure::Invalid(format!("transfers: {most} are in this graph, and no more are provided for")))
    }

    fn announce(&self, gate: usize, stream: usize) -> Result<(), Failure> {
        let gate = self.gates.gate(gate).ok_or_else(|| Failure::Invalid(format!("transfer {gate}: no gate")))?;
        self.streams.on(stream, |stream| gate.announce(stream))
    }

    fn hold(&self, gate: usize, stream: usize) -> Result<(), Failure> {
        let gate = self.gates.gate(gate).ok_or_else(|| Failure::Invalid(format!("transfer {gate}: no gate")))?;
        self.streams.on(stream, |stream| gate.pass(stream))
    }

    /// Raises what a replay has failed with.
    fn check(&self) -> Result<(), Failure> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure.again()),
            None => Ok(()),
        }
    }

    /// A graph that has begun since the last call.
    fn begun(&self) -> Option<usize> {
        (0..self.count.load(Ordering::Acquire)).find(|graph| self.gates.take(self.transfers + graph))
    }

    fn fail(&self, failure: Failure) {
        tracing::warn!("a replay is given up: {}", failure.words());
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
        self.gates.abort();
    }
}

/// The thread's work.
fn run<S: Side>(core: &Core<S::Record>, shared: &Shared<S>) {
    let (mut steps, mut since) = (Vec::new(), Instant::now());
    let mut failed = false;
    while !core.stops.load(Ordering::Acquire) {
        match core.begun() {
            Some(graph) if !failed => {
                if let Err(failure) = replay(core, shared, graph, &mut steps) {
                    core.fail(failure);
                    failed = true;
                }
                since = Instant::now();
            }
            // A graph that is launched all the same must not wait for ever: its gates are opened again and again.
            _ if failed => {
                core.gates.abort();
                std::thread::sleep(NAP);
            }
            _ if since.elapsed() < core.spin => std::thread::yield_now(),
            _ => std::thread::sleep(NAP),
        }
    }
}

fn replay<S: Side>(
    core: &Core<S::Record>,
    shared: &Shared<S>,
    graph: usize,
    steps: &mut Vec<Option<S::Step>>,
) -> Result<(), Failure> {
    if steps.len() <= graph {
        steps.resize_with(graph + 1, || None);
    }
    let step = match &mut steps[graph] {
        Some(step) => step,
        none => {
            let graphs = core.graphs.lock().unwrap_or_else(PoisonError::into_inner);
            none.insert(S::step(core.gates.clone(), graphs[graph].transfers.clone())?)
        }
    };
    let deadline = Clock::system().after(core.timeout);
    let (mut has_begun, mut turns) = (false, 0_u32);
    shared.drive(|side| {
        if !std::mem::replace(&mut has_begun, true)
            && let Err(failure) = side.begin(step)
        {
            return Some(Err(failure));
        }
        turns = turns.wrapping_add(1);
        if core.stops.load(Ordering::Relaxed) {
            side.give_up(step);
            return Some(Err(Failure::Closed("closed while a graph was replayed".into())));
        }
        if turns.is_multiple_of(TURNS) && Instant::now() >= deadline {
            side.give_up(step);
            return Some(Err(MeshError::Timeout(core.timeout).into()));
        }
        match side.turn(step) {
            Ok(false) => None,
            Ok(true) => Some(Ok(())),
            Err(failure) => Some(Err(failure)),
        }
    })
}

/// The thread, and what it shares with the program.
struct Replays<S: Side> {
    core: Arc<Core<S::Record>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    generation: u32,
}

impl<S: Side> Replays<S> {
    fn start(
        shared: &Arc<Shared<S>>,
        (transfers, graphs): (usize, usize),
        gpu: u32,
        timeout: Option<f64>,
        spin_us: u64,
    ) -> PyResult<Arc<Self>> {
        let make = || {
            let context = Context::open(gpu)?;
            let gates = Gates::new(&context, transfers.saturating_add(graphs))?;
            Ok::<_, TransportError>((context, gates))
        };
        let (context, gates) = make().map_err(Failure::from)?;
        let core = Arc::new(Core {
            gates: Arc::new(gates),
            streams: Streams::new(context),
            transfers,
            graphs: Mutex::default(),
            count: AtomicUsize::new(0),
            failure: Mutex::new(None),
            timeout: seconds(timeout)?,
            spin: Duration::from_micros(spin_us),
            stops: AtomicBool::new(false),
        });
        let (working, shared) = (core.clone(), shared.clone());
        let builder = std::thread::Builder::new().name("stepmesh replays".into());
        let thread = builder.spawn(move || run(&working, &shared))?;
        let replays = Arc::new(Self { core, thread: Mutex::new(Some(thread)), generation: process::generation() });
        process::register(&replays);
        Ok(replays)
    }

    /// Ends the thread; a graph that runs is given up.
    fn stop(&self) {
        // A child has none of its parent's threads.
        if self.generation != process::generation() {
            return;
        }
        self.core.stops.store(true, Ordering::Release);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
            self.core.gates.abort();
        }
    }
}

impl<S: Side> Open for Replays<S> {
    fn wake(&self) {}

    fn close(&self) {
        self.stop();
    }
}

impl<S: Side> Drop for Replays<S> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The captured steps of an attention instance.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct AttentionReplays(Arc<Replays<Attention>>);

#[pymethods]
impl AttentionReplays {
    #[new]
    #[pyo3(signature = (mesh, transfers, graphs, gpu=0, timeout=Some(60.0), spin_us=1000))]
    fn new(
        mesh: &AttentionMesh,
        transfers: usize,
        graphs: usize,
        gpu: u32,
        timeout: Option<f64>,
        spin_us: u64,
    ) -> PyResult<Self> {
        Ok(Self(Replays::start(&mesh.shared, (transfers, graphs), gpu, timeout, spin_us)?))
    }

    /// Which capture what is put on the stream now goes into, a number that no other has; none if it is executed.
    fn capture(&self, stream: usize) -> PyResult<Option<u64>> {
        Ok(self.0.core.capture(stream)?)
    }

    /// Records a request that the stream has produced in the microbatch's slot.
    #[pyo3(signature = (stream, microbatch, parts, app=None))]
    fn push_pull(&self, stream: usize, microbatch: u16, parts: &Bound<'_, PyAny>, app: Option<&[u8]>) -> PyResult<()> {
        let (parts, app) = (Parts::read(parts)?, app.map_or(Ok([0; 16]), self::app)?);
        let core = &self.0.core;
        Ok(core.record(stream, |transfers| {
            let at = core.next(transfers)?;
            core.announce(at, stream)?;
            transfers.push(Transfer { microbatch, group: 0, parts: parts.in_use().to_vec(), app });
            Ok(())
        })?)
    }

    /// Has the stream wait for the replies to the microbatch's last request.
    fn wait(&self, stream: usize, microbatch: u16) -> PyResult<()> {
        let core = &self.0.core;
        Ok(core.record(stream, |transfers| {
            let is_of = |transfer: &Transfer| transfer.microbatch == microbatch;
            let at = transfers.iter().rposition(is_of).ok_or_else(|| {
                Failure::Unknown(format!("microbatch: {microbatch}: this graph has sent nothing for it"))
            })?;
            core.hold(at, stream)
        })?)
    }

    /// Raises what a replay has failed with; nothing while all is well.
    fn check(&self) -> PyResult<()> {
        Ok(self.0.core.check()?)
    }

    /// Ends the thread. A graph that runs is given up: its stream goes on, and its results are worth nothing.
    fn close(&self, py: Python<'_>) {
        process::detached(py, || self.0.stop());
    }
}

/// What each attention rank sends or is sent, none for those whom another FFN instance answers.
fn by_rank(given: &Bound<'_, PyAny>) -> Result<Vec<Option<Vec<MeshPart>>>, Failure> {
    let mut ranks = Vec::new();
    for parts in given.try_iter()? {
        let parts = parts?;
        ranks.push(if parts.is_none() { None } else { Some(Parts::read(&parts)?.in_use().to_vec()) });
    }
    Ok(ranks)
}

/// The captured steps of an FFN instance.
#[pyclass(frozen, module = "stepmesh")]
pub(crate) struct FfnReplays(Arc<Replays<Ffn>>);

#[pymethods]
impl FfnReplays {
    #[new]
    #[pyo3(signature = (mesh, transfers, graphs, gpu=0, timeout=Some(60.0), spin_us=1000))]
    fn new(
        mesh: &FfnMesh,
        transfers: usize,
        graphs: usize,
        gpu: u32,
        timeout: Option<f64>,
        spin_us: u64,
    ) -> PyResult<Self> {
        Ok(Self(Replays::start(&mesh.shared, (transfers, graphs), gpu, timeout, spin_us)?))
    }

    /// Which capture what is put on the stream now goes into, a number that no other has; none if it is executed.
    fn capture(&self, stream: usize) -> PyResult<Option<u64>> {
        Ok(self.0.core.capture(stream)?)
    }

    /// Has the stream wait for a microbatch's next requests: `requests` has each attention rank's parts, none for those whom another
    /// FFN instance answers.
    fn next_batch(&self, stream: usize, microbatch: u16, requests: &Bound<'_, PyAny>) -> PyResult<()> {
        let requests = by_rank(requests)?;
        let core = &self.0.core;
        Ok(core.record(stream, |transfers| {
            let at = core.next(transfers)?;
            core.hold(at, stream)?;
            transfers.push(Awaited { microbatch, requests, replies: Vec::new() });
            Ok(())
        })?)
    }

    /// Records the replies to the microbatch's last requests, which the stream has produced in their slots.
    fn respond(&self, stream: usize, microbatch: u16, replies: &Bound<'_, PyAny>) -> PyResult<()> {
        let replies = by_rank(replies)?;
        let core = &self.0.core;
        Ok(core.record(stream, |transfers| {
            let is_of = |transfer: &Awaited| transfer.microbatch == microbatch;
            let at = transfers.iter().rposition(is_of).ok_or_else(|| {
                Failure::Unknown(format!("microbatch: {microbatch}: this graph awaits nothing of it"))
            })?;
            core.announce(at, stream)?;
            transfers[at].replies = replies;
            Ok(())
        })?)
    }

    /// Raises what a replay has failed with; nothing while all is well.
    fn check(&self) -> PyResult<()> {
        Ok(self.0.core.check()?)
    }

    /// Ends the thread. A graph that runs is given up: its stream goes on, and its results are worth nothing.
    fn close(&self, py: Python<'_>) {
        process::detached(py, || self.0.stop());
    }
}
