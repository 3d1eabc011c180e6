//! A deployment of processes, one a member: how they are started, and what they do.

use super::ends::AttentionEnd;
use super::ffn::serve;
use super::payload::{Ask, Payload, SLOTS};
use crate::BenchError;
use crate::cpus::process_time;
use crate::process::{Process, Program};
use crate::shared::{Common, Shared};
use crate::timing::Times;
use crate::transport::Mode;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{ConnectOptions, GrpcControl};
use stepmesh_mesh::scheduler::{Background, SchedulerOptions, ServeOptions, spawn};
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, Request};
use stepmesh_transport::{Clock, DeviceOptions, Provider};

/// Members of a side at most.
pub(super) const MOST: usize = 64;
/// How long the members may take to join, and each to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether they still run.
const LOOK: Duration = Duration::from_millis(5);

/// What the processes have in common.
#[repr(C)]
pub(super) struct Words {
    /// Attention instances that are linked with everybody.
    linked: AtomicU64,
    /// Not zero: rounds are timed.
    is_timed: AtomicU64,
    /// Not zero: every attention instance ends after so many rounds, so that none waits for another for ever.
    last_round: AtomicU64,
    /// Not zero: the FFN instances end.
    over: AtomicU64,
    /// Of each attention instance: rounds, and the median of those that were timed, in nanoseconds.
    rounds: [AtomicU64; MOST],
    median_ns: [AtomicU64; MOST],
}

// SAFETY: atomics only.
unsafe impl Common for Words {}

/// What a process of a deployment is told, in this order, by the arguments that are added to a program's.
#[derive(Clone, Debug)]
pub struct MemberRole {
    /// The memory that all of them share.
    pub board: PathBuf,
    /// The scheduler's URL.
    pub scheduler: String,
    /// The transport.
    pub provider: Provider,
    /// The number of an attention instance; none is an FFN instance.
    pub attention: Option<usize>,
}

/// Runs so many members of each side as processes for a while: the median of the attention instances' medians of a round in
/// microseconds, and the CPU time of all of them for a round of all.
pub(super) fn measure(
    program: &Program,
    provider: Provider,
    members: u32,
    budget: Duration,
) -> Result<(f64, Duration), BenchError> {
    // Ended before the scheduler, which is told of everybody's leaving.
    let (scheduler, board) = (spawn(ServeOptions::new(SchedulerOptions::new(members, members)))?, Shared::new()?);
    let mut processes = Processes::start(program, &board, &scheduler, provider, members)?;
    processes.until(PATIENCE, |board| board.linked.load(Ordering::Acquire) == u64::from(members))?;
    processes.sleep(budget / 5)?;
    board.is_timed.store(1, Ordering::Release);
    let (cpu, rounds) = processes.spent();
    processes.sleep(budget)?;
    let (cpu, rounds) = (processes.spent().0 - cpu, (processes.spent().1 - rounds).max(1));
    processes.end()?;
    let medians = &board.median_ns[..members as usize];
    let mut medians: Vec<_> = medians.iter().map(|median| median.load(Ordering::Acquire)).collect();
    medians.sort_unstable();
    Ok((medians[medians.len() / 2] as f64 / 1e3, cpu.mul_f64(f64::from(members) / rounds as f64)))
}

struct Processes {
    board: Shared<Words>,
    attention: Vec<Process>,
    ffn: Vec<Process>,
}

impl Processes {
    fn start(
        program: &Program,
        board: &Shared<Words>,
        scheduler: &Background,
        provider: Provider,
        members: u32,
    ) -> Result<Self, BenchError> {
        let start = |number: Option<u32>| {
            let told = [board.path().into(), scheduler.url().into(), provider.name().into()];
            program.start(told.into_iter().chain(number.map(|number| number.to_string().into())))
        };
        let ffn = (0..members).map(|_| start(None)).collect::<Result<_, _>>()?;
        let attention = (0..members).map(|number| start(Some(number))).collect::<Result<_, _>>()?;
        Ok(Self { board: board.clone(), attention, ffn })
    }

    /// CPU time of all of them, and rounds of all attention instances.
    fn spent(&self) -> (Duration, u64) {
        let cpu = self.attention.iter().chain(&self.ffn).map(|process| process_time(process.id())).sum();
        (cpu, self.board.rounds.iter().map(|rounds| rounds.load(Ordering::Relaxed)).sum())
    }

    /// Waits until they have come so far; an error if one has ended before.
    fn until(&mut self, patience: Duration, there: impl Fn(&Words) -> bool) -> Result<(), BenchError> {
        let deadline = Instant::now() + patience;
        while !there(&self.board) {
            for side in [&mut self.attention, &mut self.ffn] {
                if let Some(ended) = side.iter_mut().position(|process| !process.is_running()) {
                    side.remove(ended).finish(deadline)?;
                    return Err(BenchError::Sequence("a member's process has ended".into()));
                }
            }
            if Instant::now() > deadline {
                return Err(BenchError::NotConnected(patience.as_secs()));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn sleep(&mut self, time: Duration) -> Result<(), BenchError> {
        let end = Instant::now() + time;
        self.until(time + PATIENCE, |_| Instant::now() >= end)
    }

    /// Ends all of them in good order.
    fn end(mut self) -> Result<(), BenchError> {
        let rounds = self.board.rounds.iter().map(|rounds| rounds.load(Ordering::Acquire)).max();
        // An instance is at most as many rounds ahead of another as there are slots, and reads this before each.
        let last = rounds.unwrap_or_default() + 2 * u64::from(SLOTS);
        self.board.last_round.store(last, Ordering::Release);
        let finish = |processes: &mut Vec<Process>| {
            processes.drain(..).try_for_each(|process| process.finish(Instant::now() + PATIENCE).map(drop))
        };
        finish(&mut self.attention)?;
        self.board.over.store(1, Ordering::Release);
        finish(&mut self.ffn)
    }
}

/// Plays a member until the process that measures says that it is over.
///
/// # Errors
/// It cannot join, or a link ends.
pub fn play(role: &MemberRole) -> Result<(), BenchError> {
    let board = Shared::<Words>::open(Path::new(&role.board))?;
    // There are more members than CPUs: one that waits sleeps.
    let options = DeviceOptions { spin: Duration::ZERO, ..DeviceOptions::default() };
    let device = stepmesh_transport::open(role.provider, &options)?;
    let (payload, clock) = (Payload::new(1), Clock::system());
    let member = MemberOptions::new(payload.layout(SLOTS)?, "bench");
    let endpoint = device.endpoint()?;
    let waker = endpoint.waker();
    let control = ConnectOptions::new(role.scheduler.as_str());
    let control = Box::new(GrpcControl::connect(control, Box::new(move || waker.wake()))?);
    match role.attention {
        None => {
            let mut mesh = FfnMesh::with_endpoint(member, device, endpoint, control, clock)?;
            mesh.wait_complete(PATIENCE)?;
            serve(&mut [mesh], &payload, Duration::ZERO, || board.over.load(Ordering::Acquire) != 0).map(drop)
        }
        Some(number) => {
            let mesh = AttentionMesh::with_endpoint(member, device, endpoint, control, clock)?;
            ask(mesh, &payload, &board, number)
        }
    }
}

/// Rounds with every FFN instance, tensors in place.
fn ask(mut mesh: AttentionMesh, payload: &Payload, board: &Words, number: usize) -> Result<(), BenchError> {
    let (Some(rounds), Some(median)) = (board.rounds.get(number), board.median_ns.get(number)) else {
        return Err(BenchError::Sequence(format!("attention instance {number} of at most {MOST}")));
    };
    mesh.wait_complete(PATIENCE)?;
    board.linked.fetch_add(1, Ordering::Release);
    let mut times = Times::new()?;
    let app = Ask::Reply(Mode::InPlace).encode();
    for round in 0_u32.. {
        let (last, is_timed) = (board.last_round.load(Ordering::Acquire), board.is_timed.load(Ordering::Acquire) != 0);
        if last != 0 && u64::from(round) >= last {
            break;
        }
        let start = Instant::now();
        let buffer = mesh.acquire((round % u32::from(SLOTS)) as u16)?;
        let request = Request { group: round, app, parts: payload.request(), leave: false };
        let ticket = mesh.push_pull(buffer, request)?;
        AttentionEnd::wait(&mut mesh, ticket, |_| ())?;
        if is_timed {
            times.record(start.elapsed(), 1);
        }
        rounds.store(u64::from(round) + 1, Ordering::Release);
    }
    median.store((times.timing().p50_us * 1e3) as u64, Ordering::Release);
    Ok(())
}
