//! A scheduler that serves gRPC, and members that join it over shm or tcp.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use stepmesh_mesh::control::{ConnectOptions, GrpcControl};
use stepmesh_mesh::scheduler::{self, Background, SchedulerOptions, ServeOptions};
use stepmesh_mesh::threaded::{AttentionEngine, FfnEngine, ProgressOptions};
use stepmesh_mesh::{
    AttentionMesh, Batch, FfnMesh, MemberOptions, MeshError, PartSpec, Policy, Replies, Request, SlotLayout, Ticket,
};
use stepmesh_proto::Part;
use stepmesh_transport::{Clock, Device, DeviceOptions, Endpoint, Provider};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const PROVIDERS: [Provider; 2] = [Provider::Shm, Provider::Tcp];
pub(crate) const MICROBATCHES: u16 = 3;
const ROWS: u32 = 32;
const ROW_BYTES: u32 = 1024;

pub(crate) struct Deployment {
    pub(crate) scheduler: Background,
    provider: Provider,
    pub(crate) progress: ProgressOptions,
}

type Parts = (Arc<dyn Device>, Box<dyn Endpoint>, Box<GrpcControl>);

impl Deployment {
    pub(crate) fn new(provider: Provider, attention: u32, ffn: u32) -> Self {
        let options = ServeOptions::new(SchedulerOptions::new(attention, ffn));
        let scheduler = scheduler::spawn(options).unwrap();
        Self { scheduler, provider, progress: ProgressOptions::default() }
    }

    fn options(&self, rank: u32) -> MemberOptions {
        let part = PartSpec { row_bytes: ROW_BYTES, max_rows: ROWS };
        let layout = SlotLayout::new(MICROBATCHES, vec![part], vec![part]).unwrap();
        let mut options = MemberOptions::new(layout, "echo");
        options.name = format!("test-{rank}");
        options.rank = Some(rank);
        options.lanes = 2;
        options.stripe_bytes = 4096;
        options
    }

    fn parts(&self) -> Parts {
        let device = stepmesh_transport::open(self.provider, &DeviceOptions::default()).unwrap();
        let endpoint = device.endpoint().unwrap();
        let waker = endpoint.waker();
        let control = GrpcControl::connect(ConnectOptions::new(self.scheduler.url()), Box::new(move || waker.wake()));
        (device, endpoint, Box::new(control.unwrap()))
    }

    pub(crate) fn attention(&self, rank: u32) -> AttentionEngine {
        let (device, endpoint, control) = self.parts();
        let mesh = AttentionMesh::with_endpoint(self.options(rank), device, endpoint, control, Clock::system());
        AttentionEngine::start(mesh.unwrap(), self.progress.clone()).unwrap()
    }

    pub(crate) fn ffn(&self, rank: u32) -> FfnEngine {
        let (device, endpoint, control) = self.parts();
        let mesh = FfnMesh::with_endpoint(self.options(rank), device, endpoint, control, Clock::system());
        FfnEngine::start(mesh.unwrap(), self.progress.clone()).unwrap()
    }

    /// An attention instance and an FFN instance that the test answers for, complete.
    pub(crate) fn pair(&self) -> (AttentionEngine, FfnEngine) {
        let (mut attention, mut ffn) = (self.attention(0), self.ffn(0));
        attention.wait_complete(PATIENCE).unwrap();
        ffn.wait_complete(PATIENCE).unwrap();
        while ffn.next_event().is_some() {}
        (attention, ffn)
    }
}

/// An FFN instance with a thread that answers each byte `b` with `b + rank + 1`, until it is dropped.
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(mut engine: FfnEngine) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let serve = move || {
            while !stopped.load(Ordering::Relaxed) {
                while engine.next_event().is_some() {}
                if let Some(batch) = engine.next_batch(Policy::All, Duration::from_millis(50)).unwrap() {
                    answer(&mut engine, batch);
                }
            }
        };
        Self { stop, thread: Some(std::thread::spawn(serve)) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.take().unwrap().join();
        assert!(joined.is_ok() || std::thread::panicking());
    }
}

/// The next batch, whatever events come first.
pub(crate) fn next(engine: &mut FfnEngine, policy: Policy) -> Batch {
    let began = std::time::Instant::now();
    loop {
        while engine.next_event().is_some() {}
        if let Some(batch) = engine.next_batch(policy, PATIENCE).unwrap() {
            return batch;
        }
        assert!(began.elapsed() < PATIENCE, "no batch");
    }
}

pub(crate) fn answer(engine: &mut FfnEngine, mut batch: Batch) {
    let rank = engine.rank().unwrap() as u8;
    for segment in &mut batch.segments {
        let part = segment.parts()[0];
        let (input, output) = segment.split(0, 0);
        output.iter_mut().zip(input).for_each(|(to, from)| *to = from.wrapping_add(rank + 1));
        segment.set_reply(&[part]).unwrap();
    }
    engine.respond(batch).unwrap();
}

/// A request under way and its bytes.
pub(crate) struct Sent {
    pub(crate) ticket: Ticket,
    bytes: Vec<u8>,
}

/// Sends a random number of rows of random bytes.
pub(crate) fn send(engine: &mut AttentionEngine, microbatch: u16, group: u32, seed: u64) -> Result<Sent, MeshError> {
    let mut random = SmallRng::seed_from_u64(seed);
    let rows = random.random_range(0..=ROWS);
    let mut bytes = vec![0; (rows * ROW_BYTES) as usize];
    random.fill(bytes.as_mut_slice());
    let mut buffer = engine.acquire(microbatch)?;
    buffer.part_mut(0)[..bytes.len()].copy_from_slice(&bytes);
    let parts = [Part { key: seed, rows, row_bytes: ROW_BYTES, ..Part::default() }];
    let ticket = engine.push_pull(buffer, Request { group, parts: &parts, ..Request::default() })?;
    Ok(Sent { ticket, bytes })
}

pub(crate) fn check(sent: &Sent, replies: &Replies) {
    for rank in 0..replies.ranks() {
        let expected = sent.bytes.iter().map(|byte| byte.wrapping_add(rank as u8 + 1));
        assert!(replies.part(rank, 0).iter().copied().eq(expected), "the reply of ffn {rank} is of another request");
    }
}

pub(crate) fn finish(engine: &mut AttentionEngine, sent: &Sent) {
    check(sent, &engine.wait(sent.ticket, PATIENCE).unwrap());
}

/// Repeats an attempt until it does not block or lack a link any more.
pub(crate) fn eventually<T>(mut attempt: impl FnMut() -> Result<T, MeshError>) -> T {
    let began = std::time::Instant::now();
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(MeshError::WouldBlock(_) | MeshError::NotLinked(_)) if began.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
}
