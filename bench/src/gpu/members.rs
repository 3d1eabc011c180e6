//! The two members of a measurement, in one process or two, and what the FFN side does while the other measures.

use crate::BenchError;
use crate::process::{Process, Program};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{ConnectOptions, Control, GrpcControl, LocalScheduler};
use stepmesh_mesh::scheduler::{Background, SchedulerOptions, ServeOptions, spawn};
use stepmesh_mesh::{
    AttentionMesh, FfnMesh, MemberOptions, MeshError, PartSpec, Policy, SlotLayout, Ticket, TicketStatus,
};
use stepmesh_proto::{Dtype, Part};
use stepmesh_transport::cuda::{Context, Gates, Graph, Span, Stream, beside, beside_pinned};
use stepmesh_transport::{Clock, Device, DeviceOptions, Endpoint, GateSet, Provider};

pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// Microbatches.
pub(super) const SLOTS: u16 = 3;
/// Round trips of one graph.
pub(super) const ROUNDS: usize = 64;

/// Elements of a hidden state.
const HIDDEN: u32 = 7168;

/// Where payloads lie, and who moves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In GPU memory that both sides have mapped: nobody moves them.
    InPlace,
    /// In pinned host memory that both sides have mapped: copy engines move them.
    Staged,
}

impl Place {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::InPlace => "in_place",
            Self::Staged => "staged",
        }
    }

    fn of(name: &str) -> Option<Self> {
        [Self::InPlace, Self::Staged].into_iter().find(|place| place.name() == name)
    }
}

/// What a request and a reply of so many tokens are: FP8 there, bf16 back.
pub(super) fn parts(batch: u32) -> [Part; 2] {
    let part = |key, dtype: Dtype| {
        let row_bytes = HIDDEN * dtype.bytes() as u32;
        Part { key, dtype, rows: batch, row_bytes, offset: 0 }
    };
    [part(0, Dtype::Fp8E4M3), part(1, Dtype::Bf16)]
}

fn member(batch: u32) -> Result<MemberOptions, BenchError> {
    let spec = |part: Part| vec![PartSpec { row_bytes: part.row_bytes, max_rows: part.rows }];
    let [request, reply] = parts(batch);
    Ok(MemberOptions::new(SlotLayout::new(SLOTS, spec(request), spec(reply))?, "gpu"))
}

/// A device and its one endpoint.
type Opened = (Arc<dyn Device>, Box<dyn Endpoint>);

pub(super) fn device(context: &Arc<Context>, place: Place) -> Result<Opened, BenchError> {
    let device = stepmesh_transport::open(Provider::Shm, &DeviceOptions::default())?;
    let device = match place {
        Place::InPlace => beside(context, device),
        Place::Staged => beside_pinned(context, device),
    };
    let endpoint = device.endpoint()?;
    Ok((device, endpoint))
}

/// The other side: it ends with this.
pub(super) enum Other {
    Thread(Option<std::thread::JoinHandle<Result<(), BenchError>>>),
    Process { _process: Process, _scheduler: Background },
}

impl Other {
    /// Waits for its end, which the attention side's going has begun.
    pub(super) fn finish(self) -> Result<(), BenchError> {
        match self {
            Self::Thread(mut thread) => match thread.take().map(std::thread::JoinHandle::join) {
                Some(Ok(outcome)) => outcome,
                _ => Err(BenchError::Sequence("the FFN side's thread has ended badly".into())),
            },
            Self::Process { .. } => Ok(()),
        }
    }
}

/// What the FFN side does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// Answers at once; staged, its copy engines take the request in and the reply out before.
    Answer,
    /// Its stream answers, in graphs of many round trips, payloads in place.
    Rounds,
}

impl Task {
    fn name(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::Rounds => "rounds",
        }
    }
}

/// An attention side, and an FFN side at work: a thread, or a process if there is a program to start.
pub(super) fn pair(
    gpu: u32,
    place: Place,
    task: Task,
    batch: u32,
    second: Option<&Program>,
) -> Result<(AttentionMesh, Other), BenchError> {
    let context = Context::open(gpu)?;
    let (mut mesh, other) = match second {
        None => {
            let scheduler = LocalScheduler::new(SchedulerOptions::new(1, 1))?;
            let join = |endpoint: &dyn Endpoint| Box::new(scheduler.session(endpoint.waker())) as Box<dyn Control>;
            let (device_of_ffn, endpoint) = device(&context, place)?;
            let control = join(&*endpoint);
            let ffn = FfnMesh::with_endpoint(member(batch)?, device_of_ffn, endpoint, control, Clock::system())?;
            let thread = std::thread::spawn(move || serve(ffn, gpu, place, task, batch));
            let (device, endpoint) = device(&context, place)?;
            let control = join(&*endpoint);
            let mesh = AttentionMesh::with_endpoint(member(batch)?, device, endpoint, control, Clock::system())?;
            (mesh, Other::Thread(Some(thread)))
        }
        Some(program) => {
            let scheduler = spawn(ServeOptions::new(SchedulerOptions::new(1, 1)))?;
            let told = [scheduler.url(), gpu.to_string(), place.name().into(), task.name().into(), batch.to_string()];
            let process = program.start(told.into_iter().map(Into::into))?;
            let (device, endpoint) = device(&context, place)?;
            let waker = endpoint.waker();
            let connect = ConnectOptions::new(scheduler.url());
            let control = Box::new(GrpcControl::connect(connect, Box::new(move || waker.wake()))?);
            let mesh = AttentionMesh::with_endpoint(member(batch)?, device, endpoint, control, Clock::system())?;
            (mesh, Other::Process { _process: process, _scheduler: scheduler })
        }
    };
    mesh.wait_complete(PATIENCE)?;
    Ok((mesh, other))
}

/// What the process of an FFN side is told, in this order, by the arguments that are added to a program's.
#[derive(Clone, Debug)]
pub struct GpuRole {
    /// The scheduler's URL.
    pub scheduler: String,
    /// The GPU.
    pub gpu: u32,
    /// Where payloads lie.
    pub place: String,
    /// What it does.
    pub task: String,
    /// Tokens.
    pub batch: u32,
}

/// Plays an FFN side until the other goes.
///
/// # Errors
/// It cannot join, or a link ends.
pub fn play(role: &GpuRole) -> Result<(), BenchError> {
    let unknown = |what: &str| BenchError::Sequence(format!("`{what}` is not known to this release"));
    let place = Place::of(&role.place).ok_or_else(|| unknown(&role.place))?;
    let task = [Task::Answer, Task::Rounds].into_iter().find(|task| task.name() == role.task);
    let task = task.ok_or_else(|| unknown(&role.task))?;
    let (device, endpoint) = device(&Context::open(role.gpu)?, place)?;
    let waker = endpoint.waker();
    let connect = ConnectOptions::new(role.scheduler.as_str());
    let control = Box::new(GrpcControl::connect(connect, Box::new(move || waker.wake()))?);
    let mesh = FfnMesh::with_endpoint(member(role.batch)?, device, endpoint, control, Clock::system())?;
    serve(mesh, role.gpu, place, task, role.batch)
}

fn serve(mut mesh: FfnMesh, gpu: u32, place: Place, task: Task, batch: u32) -> Result<(), BenchError> {
    mesh.wait_complete(PATIENCE)?;
    match task {
        Task::Answer => answer(&mut mesh, gpu, place, batch),
        Task::Rounds => answer_rounds(&mut mesh, gpu, batch),
    }
}

/// So many bytes of the GPU's memory.
pub(super) fn on_device(context: &Arc<Context>, bytes: usize) -> Result<Span, BenchError> {
    let region = stepmesh_transport::Region::new(stepmesh_transport::cuda::DeviceMemory::allocate(context, bytes)?);
    Ok(Span::new(&region, 0..bytes)?)
}

/// Waits for an announcement; false if the peer goes meanwhile.
pub(super) fn announced(
    gates: &Gates,
    gate: usize,
    mut look: impl FnMut() -> Result<bool, MeshError>,
) -> Result<bool, BenchError> {
    let (mut polls, started) = (0_u32, Instant::now());
    while !gates.take(gate) {
        std::hint::spin_loop();
        polls += 1;
        if polls.is_multiple_of(1024) {
            if !look()? {
                return Ok(false);
            }
            if started.elapsed() > PATIENCE {
                return Err(MeshError::Timeout(PATIENCE).into());
            }
        }
    }
    Ok(true)
}

/// Waits for the reply to what was sent.
pub(super) fn replied(mesh: &mut AttentionMesh, ticket: Ticket) -> Result<(), BenchError> {
    let started = Instant::now();
    while mesh.status(ticket) == TicketStatus::Pending {
        mesh.poll()?;
        if started.elapsed() > PATIENCE {
            return Err(MeshError::Timeout(PATIENCE).into());
        }
    }
    mesh.take(ticket)?;
    Ok(())
}

fn span(place: Option<(stepmesh_transport::Region, std::ops::Range<usize>)>) -> Result<Span, BenchError> {
    let (region, range) = place.ok_or_else(|| BenchError::Sequence("a slot that there is not".into()))?;
    Ok(Span::new(&region, range)?)
}

pub(super) fn request_span(mesh: &AttentionMesh, microbatch: u16) -> Result<Span, BenchError> {
    span(mesh.request_place(microbatch, 0))
}

pub(super) fn reply_span(mesh: &AttentionMesh, microbatch: u16) -> Result<Span, BenchError> {
    span(mesh.reply_place(0, microbatch, 0))
}

fn answer(mesh: &mut FfnMesh, gpu: u32, place: Place, batch: u32) -> Result<(), BenchError> {
    let context = Context::open(gpu)?;
    let (stream, gates) = (Stream::new(&context)?, Gates::new(&context, 1)?);
    let gate = gates.gate(0).ok_or_else(|| BenchError::Sequence("no gate".into()))?;
    let [request, reply] = parts(batch);
    let (input, output) =
        (on_device(&context, request.bytes() as usize)?, on_device(&context, reply.bytes() as usize)?);
    let mut slots = Vec::new();
    for microbatch in 0..SLOTS {
        slots.push((span(mesh.request_place(0, microbatch, 0))?, span(mesh.reply_place(0, microbatch, 0))?));
    }
    while mesh.is_complete() {
        mesh.poll()?;
        let Some(mut batch) = mesh.try_next_batch(Policy::All) else { continue };
        if place == Place::Staged {
            let (from, to) = &slots[usize::from(batch.microbatch)];
            stream.copy(from, &input)?;
            stream.copy(&output, to)?;
            gate.announce(&stream)?;
            if !announced(&gates, 0, || mesh.poll().map(|_| mesh.is_complete()))? {
                break;
            }
        }
        batch.segments.iter_mut().try_for_each(|segment| segment.set_reply(&[reply]))?;
        mesh.respond(batch)?;
    }
    Ok(stream.finish(PATIENCE)?)
}

/// Its stream passes a gate when the request is there and announces when the reply is; many round trips are one graph.
fn answer_rounds(mesh: &mut FfnMesh, gpu: u32, batch: u32) -> Result<(), BenchError> {
    let context = Context::open(gpu)?;
    let (stream, gates) = (Stream::new(&context)?, Gates::new(&context, ROUNDS)?);
    let [_, reply] = parts(batch);
    let graph = Graph::capture(&stream, |stream| {
        (0..ROUNDS).filter_map(|round| gates.gate(round)).try_for_each(|gate| {
            gate.pass(stream)?;
            gate.announce(stream)
        })
    })?;
    graph.launch(&stream)?;
    let mut round = 0;
    while mesh.is_complete() {
        mesh.poll()?;
        let Some(mut batch) = mesh.try_next_batch(Policy::All) else { continue };
        gates.open(round);
        if !announced(&gates, round, || mesh.poll().map(|_| mesh.is_complete()))? {
            break;
        }
        batch.segments.iter_mut().try_for_each(|segment| segment.set_reply(&[reply]))?;
        mesh.respond(batch)?;
        round += 1;
        if round == ROUNDS {
            round = 0;
            stream.finish(PATIENCE)?;
            graph.launch(&stream)?;
        }
    }
    drop(gates);
    Ok(stream.finish(PATIENCE)?)
}
