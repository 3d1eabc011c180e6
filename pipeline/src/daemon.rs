//! The daemons: a checkpoint, a device, a session with the scheduler, and the loop until someone ends it.

use crate::layout::{slot_layout, workload};
use crate::options::{AttentionOptions, CheckpointSource, DaemonOptions, FfnOptions, Notice, Shutdown, Slots};
use crate::{AttentionExecutor, AttentionSide, DaemonError, FfnExecutor, FfnSide};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{ConnectOptions, Control, GrpcControl};
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, MeshError};
use stepmesh_model::cuda::{CudaAttention, CudaFfn};
use stepmesh_model::{Checkpoint, CpuAttention, CpuFfn, Dtype, LoadOptions, LoadProgress, Shard, WireDtype};
use stepmesh_transport::{Clock, Device, DeviceOptions, Endpoint, Provider};

/// How long a loop sleeps at most before it looks at `Shutdown` again; a trigger wakes it at once anyway.
const NAP: Duration = Duration::from_millis(500);
/// How long running sequences may go on after a shutdown was asked for.
const DRAIN: Duration = Duration::from_secs(1);

/// Runs an attention instance until it is told to stop, or fails.
pub fn run_attention(
    options: AttentionOptions,
    shutdown: &Shutdown,
    observe: &mut dyn FnMut(Notice),
) -> Result<(), DaemonError> {
    let daemon = &options.daemon;
    let checkpoint = open(&daemon.checkpoint)?;
    let member = member_options(daemon, &checkpoint)?;
    let mut told = |progress: LoadProgress| observe(progress.into());
    let side = match daemon.gpu {
        None => AttentionSide::Host(Box::new(CpuAttention::load_with(&checkpoint, load_options(daemon), &mut told)?)),
        Some(index) => {
            let stage = Box::new(CudaAttention::load(&checkpoint, load_options(daemon), index, &mut told)?);
            if computes_in_slots(daemon) { AttentionSide::Gpu(stage) } else { AttentionSide::Host(stage) }
        }
    };
    let Session { device, endpoint, control } = Session::open(daemon, shutdown)?;
    let mesh = AttentionMesh::with_endpoint(member, device, endpoint, control, Clock::system())?;
    let mut executor = AttentionExecutor::new(
        mesh,
        side,
        daemon.wire,
        options.kv_tokens,
        daemon.microbatches,
        daemon.max_rows,
        options.queue,
    )?;
    let mut rank = None;
    let mut drain_until = None;
    loop {
        executor.run_once(NAP)?;
        while let Some(notice) = executor.next_notice() {
            observe(notice);
        }
        if rank.is_none() {
            rank = executor.mesh().rank();
            if let Some(rank) = rank {
                observe(Notice::Joined { rank });
            }
        }
        if shutdown.is_triggered() || executor.is_draining() {
            let until = *drain_until.get_or_insert_with(|| Instant::now() + DRAIN);
            executor.drain();
            if executor.is_idle() || Instant::now() >= until {
                return Ok(());
            }
        }
    }
}

/// Runs an FFN instance until it is told to stop, or fails.
pub fn run_ffn(options: FfnOptions, shutdown: &Shutdown, observe: &mut dyn FnMut(Notice)) -> Result<(), DaemonError> {
    let daemon = &options.daemon;
    let checkpoint = open(&daemon.checkpoint)?;
    let member = member_options(daemon, &checkpoint)?;
    let Session { device, endpoint, control } = Session::open(daemon, shutdown)?;
    let mut mesh = FfnMesh::with_endpoint(member, device, endpoint, control, Clock::system())?;
    // The shard to load follows from the rank, and the rank from the scheduler.
    let deadline = Instant::now() + daemon.join_timeout;
    let rank = loop {
        mesh.poll()?;
        match mesh.rank() {
            Some(rank) => break rank,
            None if shutdown.is_triggered() => return Ok(()),
            None if Instant::now() >= deadline => return Err(MeshError::Timeout(daemon.join_timeout).into()),
            None => mesh.sleep(deadline)?,
        }
    };
    observe(Notice::Joined { rank });
    let shard = Shard::with_tensor_parallel(rank as usize, mesh.ffn(), daemon.tensor_parallel as usize)?;
    let mut told = |progress: LoadProgress| observe(progress.into());
    let side = match daemon.gpu {
        None => FfnSide::Host(Box::new(CpuFfn::load_with(&checkpoint, load_options(daemon), shard, &mut told)?)),
        Some(index) => {
            let stage = Box::new(CudaFfn::load(&checkpoint, load_options(daemon), shard, index, &mut told)?);
            if computes_in_slots(daemon) { FfnSide::Gpu(stage) } else { FfnSide::Host(stage) }
        }
    };
    drop(checkpoint);
    let mut executor = FfnExecutor::new(mesh, side, daemon.wire, options.policy)?;
    loop {
        executor.run_once(NAP)?;
        while let Some(notice) = executor.next_notice() {
            observe(notice);
        }
        if shutdown.is_triggered() || executor.is_draining() {
            return Ok(());
        }
    }
}

/// Whether a GPU computes in the slots themselves. Partial sums must travel as its activations are.
fn computes_in_slots(daemon: &DaemonOptions) -> bool {
    daemon.gpu.is_some()
        && daemon.slots != Slots::Host
        && (daemon.wire.reply() == WireDtype::Bf16) == (daemon.dtype != Dtype::F32)
}

fn open(source: &CheckpointSource) -> Result<Checkpoint, DaemonError> {
    let checkpoint = match source {
        CheckpointSource::Directory(dir) => Checkpoint::open(dir)?,
        CheckpointSource::Embedded { config, weights } => Checkpoint::from_bytes(config, weights)?,
    };
    let skipped = checkpoint.inventory();
    if skipped.skipped_tensors > 0 {
        let (tensors, bytes) = (skipped.skipped_tensors, skipped.skipped_bytes);
        tracing::info!(tensors, bytes, "the checkpoint's vision weights are skipped: this is the text model");
    }
    Ok(checkpoint)
}

fn load_options(daemon: &DaemonOptions) -> LoadOptions {
    let mut options = LoadOptions::new(daemon.dtype);
    options.threads = daemon.threads;
    options
}

impl From<LoadProgress> for Notice {
    fn from(progress: LoadProgress) -> Self {
        Self::Loading { done: progress.done_bytes, total: progress.total_bytes }
    }
}

fn member_options(daemon: &DaemonOptions, checkpoint: &Checkpoint) -> Result<MemberOptions, DaemonError> {
    if daemon.max_rows == 0 {
        return Err(DaemonError::Option("max_rows is 0: a microbatch has one row at least".into()));
    }
    let config = checkpoint.config();
    let layout = slot_layout(config, daemon.wire, daemon.microbatches, daemon.max_rows)?;
    let mut workload = workload(config, daemon.dtype, daemon.wire, daemon.tensor_parallel);
    if daemon.transport == Provider::Shm && daemon.slots == Slots::Gpu && computes_in_slots(daemon) {
        workload.push_str(", slots in GPU memory");
    }
    let mut member = MemberOptions::new(layout, workload);
    member.name = daemon.name.clone();
    member.rank = daemon.rank;
    member.lanes = daemon.lanes;
    member.memory_limit_bytes = daemon.memory_limit_bytes;
    member.connect_timeout = daemon.connect_timeout;
    Ok(member)
}

/// A device with its one endpoint, and the session whose news wake it.
struct Session {
    device: Arc<dyn Device>,
    endpoint: Box<dyn Endpoint>,
    control: Box<dyn Control>,
}

impl Session {
    fn open(daemon: &DaemonOptions, shutdown: &Shutdown) -> Result<Self, DaemonError> {
        let device = DeviceOptions {
            gpu: daemon.gpu.filter(|_| computes_in_slots(daemon)),
            gpu_staging: daemon.slots == Slots::Pinned,
            ..daemon.device.clone()
        };
        let device = stepmesh_transport::open(daemon.transport, &device)?;
        let endpoint = device.endpoint()?;
        shutdown.watch(endpoint.waker());
        let waker = endpoint.waker();
        let connect =
            ConnectOptions::new(daemon.scheduler.as_str()).token(daemon.token.clone()).timeout(daemon.join_timeout);
        let control = GrpcControl::connect(connect, Box::new(move || waker.wake()))?;
        Ok(Self { device, endpoint, control: Box::new(control) })
    }
}
