//! A row of the mesh suite: one deployment at play between two measurements of its floor.

use super::deployment::Deployment;
use super::ends::{AttentionEnd, FfnEnd, GivesWay};
use super::ffn::serve;
use super::payload::SLOTS;
use super::play::{Phases, Played, Player};
use super::{Engine, Options, Plan};
use crate::cpus::{allowed, thread_seconds};
use crate::floor::{self, Perftest};
use crate::timing::{Times, Timing};
use crate::transport::{Mode, own};
use crate::{BenchError, Drift};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering::Acquire;
use std::time::Duration;
use stepmesh_mesh::threaded::{AttentionEngine, FfnEngine, ProgressOptions};
use stepmesh_transport::{DeviceOptions, Provider};

/// What a stage of the three-stage pipeline may take at 20 tokens a second over 61 layers: A2F and F2A together.
const BUDGET_US: f64 = 272.0;
/// Microseconds that a 400 Gb/s wire takes for a byte.
const WIRE_US: f64 = 8.0 / 400e3;
/// Longer than a spinning end ever waits; one that shares its CPU sleeps at once.
const SPIN: Duration = Duration::from_secs(1);
/// The names of the progress threads.
const ATTENTION_THREAD: &str = "bench-attention";
const FFN_THREAD: &str = "bench-ffn";

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Attention instances.
    pub attention: u32,
    /// FFN instances; each gets every request.
    pub ffn: u32,
    /// Requests of each attention instance under way at once.
    pub microbatches: u16,
    /// Over what.
    pub provider: &'static str,
    /// Where tensors are produced.
    pub mode: Mode,
    /// Who drives the members.
    pub engine: Engine,
    /// Who gets a request.
    pub routing: &'static str,
    /// Tokens of a transfer.
    pub batch: u32,
    /// Bytes of a request to one FFN instance.
    pub a2f_bytes: usize,
    /// Bytes of a reply of one FFN instance.
    pub f2a_bytes: usize,
    /// How long an FFN instance computed.
    pub ffn_us: f64,
    /// The median of the whole round.
    pub p50_us: f64,
    /// And its tail, with the rounds that a late one kept from starting.
    pub p90_us: f64,
    /// See `p90_us`.
    pub p99_us: f64,
    /// See `p90_us`.
    pub p999_us: f64,
    /// See `p90_us`.
    pub max_us: f64,
    /// Rounds that were timed.
    pub rounds: u64,
    /// Medians of the steps, from stamps that travel in band, of rounds that were watched more closely.
    pub phases: BTreeMap<&'static str, f64>,
    /// What `ratio` refers to, of one round of 1A1F; none where no floor is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub floor: Option<Floor>,
    /// Ours / floor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// The floor with a checked header each way, and nothing else of the mesh: the least that its protocol takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub with_headers: Option<Floor>,
    /// Where ours and the floor took turns: the medians of both, round by round; the row is of the middle round.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rounds_us: Vec<[f64; 2]>,
    /// What the floor did meanwhile.
    pub drift: Drift,
    /// What the CPUs did for it.
    pub cpu: Cpu,
    /// What the round takes of the pipeline's time.
    pub budget: Budget,
}

/// The least that the machine can do it in.
#[derive(Clone, Debug, Serialize)]
pub struct Floor {
    /// By which means.
    pub name: &'static str,
    /// Of a round.
    pub p50_us: f64,
}

/// Core-seconds, those of warm-up and checks included; an end that spins uses its core all the time.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cpu {
    /// Of the attention side.
    pub attention_core_s: f64,
    /// Of the FFN side.
    pub ffn_core_s: f64,
    /// Microseconds of both for one request and one reply.
    pub core_us_per_transfer: f64,
}

/// The share of the wire stage's 272 µs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Budget {
    /// The stage.
    pub stage_us: f64,
    /// What of it the round takes here, in software and memory.
    pub share: f64,
    /// What a 400 Gb/s wire would add for the bytes of the busiest end.
    pub wire_400g_us: f64,
    /// Both.
    pub share_with_wire: f64,
}

/// The median of a round, alone.
pub(super) fn round_us(options: &Options, plan: &Plan) -> Result<f64, BenchError> {
    Ok(called(options, plan)?.0.measured.timing.p50_us)
}

/// Takes a row between two measurements of its floor.
pub(super) fn take(options: &Options, plan: &Plan, attempt: usize) -> Result<Row, BenchError> {
    let before = bare(options, plan)?;
    let (played, responses, cpu) = match plan.engine {
        Engine::Caller => called(options, plan)?,
        Engine::Threaded => {
            let Deployment { attention, ffn } = join(options, plan, Duration::ZERO)?;
            let [a, b] = threads(options);
            let attention = attention.into_iter().map(|mesh| AttentionEngine::start(mesh, a.clone()));
            let ffn = ffn.into_iter().map(|mesh| FfnEngine::start(mesh, b.clone()));
            duel(options, plan, attention.collect::<Result<_, _>>()?, ffn.collect::<Result<_, _>>()?)?
        }
    };
    let with_headers = headed(options, plan)?;
    let after = bare(options, plan)?;
    let medians = [before, after].map(|floor| floor.map_or(1.0, |(_, timing)| timing.p50_us));
    let floor = before.map(|(name, _)| Floor { name, p50_us: medians.iter().sum::<f64>() / 2.0 });
    let p50_us = played.measured.timing.p50_us;
    let under_way = usize::from(options.microbatches) * options.attention as usize;
    let tail = played.measured.singles.tail(p50_us / under_way as f64);
    let [a2f_bytes, f2a_bytes] = plan.payload.bytes();
    let transfers = played.rounds as f64 * f64::from(options.ffn);
    let cpu = Cpu { core_us_per_transfer: (cpu.attention_core_s + cpu.ffn_core_s) * 1e6 / transfers.max(1.0), ..cpu };
    Ok(Row {
        attention: options.attention,
        ffn: options.ffn,
        microbatches: options.microbatches,
        provider: options.provider.name(),
        mode: plan.mode,
        engine: plan.engine,
        routing: "broadcast",
        batch: plan.payload.batch,
        a2f_bytes,
        f2a_bytes,
        ffn_us: options.ffn_time.as_secs_f64() * 1e6,
        p50_us,
        p90_us: tail.p90_us,
        p99_us: tail.p99_us,
        p999_us: tail.p999_us,
        max_us: tail.max_us,
        rounds: played.measured.singles.count(),
        phases: medians_of(&played.phases, &responses),
        ratio: floor.as_ref().map(|floor| p50_us / floor.p50_us),
        with_headers,
        rounds_us: Vec::new(),
        floor,
        drift: Drift::new(medians[0], medians[1], attempt),
        cpu,
        budget: Budget::of(options, p50_us, [a2f_bytes, f2a_bytes]),
    })
}

/// Both sides at play, each driven by whoever calls it. A device that is software needs a CPU, too: where the two ends have all,
/// they give way.
fn called(options: &Options, plan: &Plan) -> Result<(Played, Times, Cpu), BenchError> {
    let Deployment { attention, ffn } = join(options, plan, SPIN)?;
    if options.provider == Provider::Verbs && allowed().len() <= options.cpus.list().len() {
        let attention = attention.into_iter().map(GivesWay).collect();
        return duel(options, plan, attention, ffn.into_iter().map(GivesWay).collect());
    }
    duel(options, plan, attention, ffn)
}

/// The row's deployment, in which a call that waits polls for `spin` before it sleeps.
fn join(options: &Options, plan: &Plan, spin: Duration) -> Result<Deployment, BenchError> {
    let layout = plan.payload.layout(SLOTS.max(options.microbatches))?;
    let device = DeviceOptions { spin, ..options.device.clone() };
    Deployment::join(options.provider, &device, [options.attention, options.ffn], &layout)
}

/// Both sides at play, to their end.
fn duel<A: AttentionEnd, F: FfnEnd>(
    options: &Options,
    plan: &Plan,
    mut attention: Vec<A>,
    mut ffn: Vec<F>,
) -> Result<(Played, Times, Cpu), BenchError> {
    let slots = SLOTS.max(options.microbatches);
    let ((played, attention_core_s), (responses, ffn_core_s)) = options.cpus.duel(
        |_| {
            let player = Player::new(&mut attention, &plan.payload, plan.mode, slots, options.microbatches);
            let played = player.play(options.provider.name(), options.budget())?;
            Ok((played, thread_seconds(ATTENTION_THREAD)))
        },
        |over| {
            let responses = serve(&mut ffn, &plan.payload, options.ffn_time, || over.load(Acquire))?;
            Ok((responses, thread_seconds(FFN_THREAD)))
        },
    )?;
    Ok((played, responses, Cpu { attention_core_s, ffn_core_s, core_us_per_transfer: 0.0 }))
}

/// Where the progress threads of the two sides run: on CPUs of their own, if there are any.
fn threads(options: &Options) -> [ProgressOptions; 2] {
    let [a, b] = options.cpus.list();
    let others: Vec<_> = allowed().into_iter().filter(|&cpu| cpu != a && cpu != b).collect();
    let cpus = if let &[first, second, ..] = others.as_slice() { [Some(first), Some(second)] } else { [None; 2] };
    let thread = |name: &str, cpu| ProgressOptions { name: name.into(), cpu, spin: SPIN };
    [thread(ATTENTION_THREAD, cpus[0]), thread(FFN_THREAD, cpus[1])]
}

/// The floor of a row.
fn bare(options: &Options, plan: &Plan) -> Result<Option<(&'static str, Timing)>, BenchError> {
    let (cpus, budget) = (options.cpus, options.budget());
    let bytes = plan.payload.bytes();
    Ok(Some(match (options.provider, plan.mode) {
        (Provider::Shm, Mode::InPlace) => ("cache_line", floor::bounce(cpus, budget)?),
        (Provider::Shm, Mode::Copy) => {
            let device = stepmesh_transport::open(Provider::Shm, &DeviceOptions::default())?;
            let timing = floor::slot_echo(device.as_ref(), cpus, bytes, None, usize::from(SLOTS), budget)?;
            ("one_copy_each_way", timing)
        }
        (Provider::Tcp, _) => ("socket_echo", floor::exchange(cpus, bytes, usize::from(SLOTS), budget)?),
        (Provider::Verbs, _) => {
            let device = |end| own(Provider::Verbs, &options.device, end).verbs.devices.into_iter().next();
            let devices = [0, 1].map(|end| device(end).unwrap_or_default());
            let perftest = Perftest::new(&devices, cpus)?;
            // As many as take about as long as ours over an emulated fabric: 100 µs, and 32 bytes a microsecond.
            let count = |bytes: usize| (budget.as_micros() as u64 / (100 + bytes as u64 / 32)).clamp(50, 10_000);
            let [there, back] = bytes.map(|bytes| perftest.round_trips("ib_write_lat", bytes, count(bytes)));
            // Half of each: one way there, one way back.
            ("ib_write_lat", there?.halved().plus(back?.halved()))
        }
        (Provider::Mem, _) => return Ok(None),
    }))
}

/// The floor with headers, where tensors pass through shared memory.
fn headed(options: &Options, plan: &Plan) -> Result<Option<Floor>, BenchError> {
    if options.provider != Provider::Shm {
        return Ok(None);
    }
    let bytes = if plan.mode == Mode::Copy { plan.payload.bytes() } else { [0, 0] };
    let device = stepmesh_transport::open(Provider::Shm, &DeviceOptions::default())?;
    let parts = Some([plan.payload.request(), plan.payload.reply()]);
    let slots = usize::from(SLOTS);
    let timing = floor::slot_echo(device.as_ref(), options.cpus, bytes, parts, slots, options.budget())?;
    Ok(Some(Floor { name: "floor_with_headers", p50_us: timing.p50_us }))
}

fn medians_of(phases: &Phases, responses: &Times) -> BTreeMap<&'static str, f64> {
    let Phases { fill, request_post, a2f, ffn_queue, ffn_process, f2a, wake_up } = phases;
    let median = |times: &Times| times.timing().p50_us;
    // A transfer is seen before the call that posts it has returned, where the other end is quick.
    let rest = |whole: &Times, post: &Times| (median(whole) - median(post)).max(0.0);
    BTreeMap::from([
        ("fill", median(fill)),
        ("request_post", median(request_post)),
        ("a2f_wire", rest(a2f, request_post)),
        ("ffn_queue", median(ffn_queue)),
        ("ffn_process", median(ffn_process)),
        ("response_post", median(responses)),
        ("f2a_wire", rest(f2a, responses)),
        ("wake_up", median(wake_up)),
    ])
}

impl Budget {
    fn of(options: &Options, p50_us: f64, [a2f_bytes, f2a_bytes]: [usize; 2]) -> Self {
        // Every FFN instance takes in all requests; every attention instance takes in all replies.
        let (attention, ffn) = (f64::from(options.attention), f64::from(options.ffn));
        let a2f = a2f_bytes as f64 * attention.max(ffn);
        let f2a = f2a_bytes as f64 * attention.max(ffn);
        let wire_400g_us = (a2f + f2a) * WIRE_US;
        let software_us = (p50_us - options.ffn_time.as_secs_f64() * 1e6).max(0.0);
        Self {
            stage_us: BUDGET_US,
            share: software_us / BUDGET_US,
            wire_400g_us,
            share_with_wire: (software_us + wire_400g_us) / BUDGET_US,
        }
    }
}

impl Row {
    /// The head of the table that rows are lines of.
    pub const HEAD: &'static str = "engine    mode      batch  a2f bytes  f2a bytes     p50 µs     p90 µs     p99 µs   \
                                    p99.9 µs  floor               floor µs  ratio  +headers  of 272 µs  +400G wire";
}

/// A line of the table.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { engine, mode, batch, a2f_bytes, f2a_bytes, p50_us, p90_us, p99_us, p999_us, drift, .. } = self;
        write!(
            f,
            "{engine:<9} {mode:<9} {batch:>5} {a2f_bytes:>10} {f2a_bytes:>10} {p50_us:>10.3} {p90_us:>10.3} \
             {p99_us:>10.3} {p999_us:>10.3}"
        )?;
        match (&self.floor, self.ratio) {
            (Some(Floor { name, p50_us }), Some(ratio)) => write!(f, "  {name:<17} {p50_us:>10.3} {ratio:>6.2}")?,
            _ => write!(f, "  {:<17} {:>10} {:>6}", "none", "", "")?,
        }
        match &self.with_headers {
            Some(Floor { p50_us, .. }) => write!(f, " {p50_us:>9.3}")?,
            None => write!(f, " {:>9}", "")?,
        }
        write!(f, " {:>8.1} % {:>9.1} %", self.budget.share * 100.0, self.budget.share_with_wire * 100.0)?;
        if !drift.is_steady() {
            write!(f, "  floor drifted by {:.0} %", drift.share * 100.0)?;
        }
        Ok(())
    }
}
