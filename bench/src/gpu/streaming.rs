//! Zero SM: a product that keeps every multiprocessor busy, by itself and while transfers of the paper's size run at the paper's
//! pace, in turn; and beside it what the two ways that others take would cost.

use super::members::{PATIENCE, Place, Task, announced, on_device, pair, parts, replied, reply_span, request_span};
use super::{GpuOptions, Tell, median};
use crate::BenchError;
use crate::process::Program;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use stepmesh_mesh::{MeshError, Request};
use stepmesh_model::cuda::{GemmBench, SpinBench};
use stepmesh_transport::GateSet;
use stepmesh_transport::cuda::{Context, Gates, Stream};

/// One transfer there and one back in this time: the paper's stage of 50 ms a token and 61 layers, and three stages.
const PACE: Duration = Duration::from_micros(272);
/// Tokens of a transfer.
const BATCH: u32 = 128;
/// The product, `[rows, n, k]`.
const PRODUCT: [usize; 3] = [8192, 8192, 8192];

const REST: u8 = 0;
const PACED: u8 = 1;
const FLAT_OUT: u8 = 2;

/// Something that runs beside the product when it is told to.
trait Beside {
    fn start(&mut self, flat_out: bool) -> Result<(), BenchError>;
    /// How many transfers it has made since it was started.
    fn stop(&mut self) -> Result<u64, BenchError>;
}

pub(super) fn run(options: &GpuOptions, tell: &mut Tell<'_>) -> Result<(), BenchError> {
    let gemm = GemmBench::new(options.gpu, PRODUCT, true)?;
    let (pairs, window) = if options.quick { (2, 0.05) } else { (11, 0.15) };
    let count = (window / gemm.time(3, 20)?.as_secs_f64()).ceil() as usize;
    // Until the card has come to the clock that its power allows.
    let warm = Instant::now();
    while warm.elapsed() < Duration::from_millis(if options.quick { 100 } else { 2000 }) {
        tflops(&gemm, count)?;
    }
    let product = |beside: &mut dyn Beside, name: &str, pairs: usize, flat_out: bool, tell: &mut Tell<'_>| {
        let (mut alone, mut noise, mut ratios, mut transfers, mut took) = (Vec::new(), Vec::new(), Vec::new(), 0, 0.0);
        for _ in 0..pairs {
            let before = tflops(&gemm, count)?;
            beside.start(flat_out)?;
            let started = Instant::now();
            let meanwhile = tflops(&gemm, count);
            took += started.elapsed().as_secs_f64();
            transfers += beside.stop()?;
            let after = tflops(&gemm, count)?;
            let base = (before + after) / 2.0;
            alone.push(base);
            noise.push(after / before);
            ratios.push(meanwhile? / base);
        }
        let (tflops_alone, ratio) = (median(alone), median(ratios.clone()));
        let worst = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        tell(json!({
            "part": "zero_sm", "beside": name, "pace": if flat_out { "flat_out" } else { "272us" }, "mps": options.is_mps,
            "cublas": gemm.has_cublas(), "gemm_alone_tflops": tflops_alone,
            "gemm_while_streaming_tflops": tflops_alone * ratio, "ratio": ratio, "worst_ratio": worst,
            "alone_alone_ratio": median(noise), "pairs": pairs, "transfers_a_second": transfers as f64 / took,
        }))
    };
    for second in [None, options.second.as_ref()] {
        for place in [Place::InPlace, Place::Staged] {
            let mut streaming = Driven::transfers(options.gpu, place, second)?;
            let name =
                format!("{} of {}", place.name(), if second.is_some() { "two processes" } else { "one process" });
            product(&mut streaming, &name, pairs, false, tell)?;
            product(&mut streaming, &name, pairs.min(5), true, tell)?;
            streaming.end()?;
        }
        if options.second.is_none() {
            break;
        }
    }
    let mut copy = Driven::copies(options.gpu)?;
    product(&mut copy, "copies between places of the GPU, which its multiprocessors make", pairs.min(5), false, tell)?;
    product(&mut copy, "copies between places of the GPU, which its multiprocessors make", pairs.min(5), true, tell)?;
    copy.end()?;
    product(
        &mut Spinning { gpu: options.gpu, kernel: None },
        "one thread of a kernel that spins",
        pairs.min(5),
        false,
        tell,
    )
}

/// Transfers alone for two seconds, for whoever watches the GPU.
pub(super) fn alone(options: &GpuOptions, is_staged: bool, tell: &mut Tell<'_>) -> Result<(), BenchError> {
    let place = if is_staged { Place::Staged } else { Place::InPlace };
    let mut streaming = Driven::transfers(options.gpu, place, None)?;
    streaming.start(false)?;
    let time = Duration::from_millis(if options.quick { 100 } else { 1500 });
    std::thread::sleep(time);
    let transfers = streaming.stop()?;
    streaming.end()?;
    let rate = transfers as f64 / time.as_secs_f64();
    tell(json!({ "part": "stream", "place": place.name(), "transfers": transfers, "transfers_a_second": rate }))
}

fn tflops(gemm: &GemmBench, count: usize) -> Result<f64, BenchError> {
    let started = Instant::now();
    (0..count).try_for_each(|_| gemm.launch())?;
    gemm.finish()?;
    Ok(gemm.operations() * count as f64 / started.elapsed().as_secs_f64() / 1e12)
}

/// What a thread is told and says.
#[derive(Default)]
struct Orders {
    mode: AtomicU8,
    is_over: AtomicBool,
    is_ready: AtomicBool,
    done: AtomicU64,
}

impl Orders {
    /// Waits for the next turn: false when all is over.
    fn turn(&self, next: &mut Instant) -> bool {
        loop {
            if self.is_over.load(Ordering::Acquire) {
                return false;
            }
            match self.mode.load(Ordering::Acquire) {
                FLAT_OUT => return true,
                PACED if Instant::now() >= *next => {
                    *next = (*next + PACE).max(Instant::now());
                    return true;
                }
                PACED => std::hint::spin_loop(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    fn start(&self, flat_out: bool) {
        self.done.store(0, Ordering::Release);
        self.mode.store(if flat_out { FLAT_OUT } else { PACED }, Ordering::Release);
    }

    fn stop(&self) -> u64 {
        self.mode.store(REST, Ordering::Release);
        self.done.load(Ordering::Acquire)
    }
}

type Thread = std::thread::JoinHandle<Result<(), BenchError>>;

/// A thread that does something whenever it is told to.
struct Driven {
    orders: Arc<Orders>,
    thread: Option<Thread>,
}

impl Driven {
    /// The runtime's own transfers.
    fn transfers(gpu: u32, place: Place, second: Option<&Program>) -> Result<Self, BenchError> {
        let second = second.cloned();
        Self::start_thread(move |orders| transfer(orders, gpu, place, second.as_ref()))
    }

    /// Copies of the same size from one place of the GPU to another.
    fn copies(gpu: u32) -> Result<Self, BenchError> {
        Self::start_thread(move |orders| copy(orders, gpu))
    }

    /// Waits until it is ready for orders.
    fn start_thread(work: impl FnOnce(&Orders) -> Result<(), BenchError> + Send + 'static) -> Result<Self, BenchError> {
        let orders = Arc::new(Orders::default());
        let told = orders.clone();
        let mut thread = Some(std::thread::spawn(move || work(&told)));
        let started = Instant::now();
        while !orders.is_ready.load(Ordering::Acquire) {
            if thread.as_ref().is_some_and(Thread::is_finished) {
                join(&mut thread)?;
            }
            if started.elapsed() > PATIENCE {
                return Err(MeshError::Timeout(PATIENCE).into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Self { orders, thread })
    }

    fn end(mut self) -> Result<(), BenchError> {
        self.orders.is_over.store(true, Ordering::Release);
        join(&mut self.thread)
    }
}

fn join(thread: &mut Option<Thread>) -> Result<(), BenchError> {
    let ended = || BenchError::Sequence("a thread has ended badly".into());
    thread.take().ok_or_else(ended)?.join().map_err(|_| ended())?
}

impl Beside for Driven {
    fn start(&mut self, flat_out: bool) -> Result<(), BenchError> {
        if self.thread.as_ref().is_none_or(Thread::is_finished) {
            join(&mut self.thread)?;
        }
        self.orders.start(flat_out);
        Ok(())
    }

    fn stop(&mut self) -> Result<u64, BenchError> {
        Ok(self.orders.stop())
    }
}

fn transfer(orders: &Orders, gpu: u32, place: Place, second: Option<&Program>) -> Result<(), BenchError> {
    let (mut mesh, other) = pair(gpu, place, Task::Answer, BATCH, second)?;
    let context = Context::open(gpu)?;
    let [request, reply] = parts(BATCH);
    let (output, input) =
        (on_device(&context, request.bytes() as usize)?, on_device(&context, reply.bytes() as usize)?);
    let (to, from) = (request_span(&mesh, 0)?, reply_span(&mesh, 0)?);
    // Last, so that it opens first: memory is freed when nothing waits any more.
    let (stream, gates) = (Stream::new(&context)?, Gates::new(&context, 1)?);
    let gate = gates.gate(0).ok_or_else(|| BenchError::Sequence("no gate".into()))?;
    orders.is_ready.store(true, Ordering::Release);
    let (mut next, mut round) = (Instant::now(), 0);
    while orders.turn(&mut next) {
        if place == Place::Staged {
            stream.copy(&output, &to)?;
        }
        gate.announce(&stream)?;
        announced(&gates, 0, || mesh.poll().map(|_| true))?;
        let buffer = mesh.acquire(0)?;
        let ticket = mesh.push_pull(buffer, Request { group: round, app: [0; 16], parts: &[request], leave: false })?;
        gate.pass(&stream)?;
        if place == Place::Staged {
            stream.copy(&from, &input)?;
        }
        gate.announce(&stream)?;
        replied(&mut mesh, ticket)?;
        gates.open(0);
        announced(&gates, 0, || mesh.poll().map(|_| true))?;
        round = round.wrapping_add(1);
        orders.done.fetch_add(1, Ordering::AcqRel);
    }
    stream.finish(PATIENCE)?;
    drop(mesh);
    other.finish()
}

fn copy(orders: &Orders, gpu: u32) -> Result<(), BenchError> {
    let context = Context::open(gpu)?;
    let stream = Stream::new(&context)?;
    let mut places = Vec::new();
    for part in parts(BATCH) {
        let bytes = part.bytes() as usize;
        places.push((on_device(&context, bytes)?, on_device(&context, bytes)?));
    }
    orders.is_ready.store(true, Ordering::Release);
    let mut next = Instant::now();
    while orders.turn(&mut next) {
        places.iter().try_for_each(|(from, to)| stream.copy(from, to))?;
        stream.finish(PATIENCE)?;
        orders.done.fetch_add(1, Ordering::AcqRel);
    }
    Ok(())
}

/// A kernel of one thread that waits.
struct Spinning {
    gpu: u32,
    kernel: Option<SpinBench>,
}

impl Beside for Spinning {
    fn start(&mut self, _: bool) -> Result<(), BenchError> {
        self.kernel = Some(SpinBench::start(self.gpu)?);
        Ok(())
    }

    fn stop(&mut self) -> Result<u64, BenchError> {
        self.kernel.take().map_or(Ok(()), SpinBench::end)?;
        Ok(0)
    }
}
