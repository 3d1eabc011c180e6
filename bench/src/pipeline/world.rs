//! A deployment of one attention and one FFN executor, and sequences through it. The two run in processes or on threads of
//! their own by the machine's clock, or in turn by clocks of their own over the simulated network.

use super::Options;
use super::board::Board;
use super::ffn_process::FfnProcess;
use super::front::{Front, News, Remote};
use super::side::{self, Parts, Shape};
use super::stages::Pace;
use super::threads::{NAP, Threads};
use super::turns::Turns;
use super::wire::Wire;
use crate::{BenchError, Program};
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{ConnectOptions, Control, GrpcControl, LocalScheduler};
use stepmesh_mesh::scheduler::SchedulerOptions;
use stepmesh_pipeline::Stages;
use stepmesh_proto::control::GenerateRequest;
use stepmesh_transport::Clock;
use stepmesh_transport::mem::{Fabric, FabricOptions};

/// How often it is looked whether the threads still run.
const LOOK: Duration = Duration::from_millis(2);
/// A step of the virtual clocks while the members join.
const TICK: Duration = Duration::from_millis(1);
/// Beyond the time that a run should take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Tokens of each sequence before those that are timed: the pipeline fills.
pub(super) const WARM_UP: u32 = 2;

pub(super) struct World {
    drive: Drive,
    wire: Wire,
    attention: Pace,
    ffn: Pace,
    /// The attention side's.
    clock: Clock,
    board: Board,
    /// Last: members that leave tell it so.
    front: Front,
}

/// Who runs the executors.
enum Drive {
    Threads(Threads),
    /// Attention on a thread of this process, FFN in another.
    Processes(Threads, FfnProcess),
    Turns(Box<Turns>),
}

/// What a run came to.
pub(super) struct Run {
    /// Time per output token.
    pub(super) token: Duration,
    /// Shares of the time in which the two sides did not compute.
    pub(super) stalled: [f64; 2],
    /// Cores that the two sides used: CPU time by time.
    pub(super) cores: [f64; 2],
}

/// How far the two sides are.
#[derive(Clone, Copy)]
struct Reached {
    at: Instant,
    busy: [Duration; 2],
    cpu: [Duration; 2],
}

impl World {
    /// Joins both sides and sets them going.
    pub(super) fn start(options: &Options, layers: u32, microbatches: u16) -> Result<Self, BenchError> {
        let shape = Shape { layers, microbatches };
        match (&options.ffn, options.clock) {
            (Some(program), super::Clock::Wall) => Self::of_processes(options, program, shape),
            _ => Self::of_threads(options, shape),
        }
    }

    /// Two processes, and a scheduler that they reach over loopback.
    fn of_processes(options: &Options, program: &Program, shape: Shape) -> Result<Self, BenchError> {
        let (board, clock) = (Board::new()?, Clock::system());
        board.schedule(options.scheduling);
        let wire = Wire::new(board.clone());
        let (remote, url) = Remote::start()?;
        let [_, cpu] = options.cpus.list();
        let mut process = FfnProcess::start(program, &board, &url, options.provider, shape, cpu)?;
        let device = wire.between(side::open(options.provider, &options.device)?, 0, clock.clone());
        let endpoint = device.endpoint()?;
        let waker = endpoint.waker();
        let control = GrpcControl::connect(ConnectOptions::new(url.as_str()), Box::new(move || waker.wake()))?;
        let attention = Pace::new(clock.clone(), board.clone(), 0);
        let parts = (device, endpoint, Box::new(control) as Box<dyn Control>);
        let mut attends = side::attention(parts, shape, attention.clone(), clock.clone())?;
        let deadline = Instant::now() + PATIENCE;
        while !(attends.mesh().is_linked() && attends.mesh().is_complete()) {
            attends.poll()?;
            process.look()?;
            if Instant::now() > deadline {
                return Err(BenchError::NotConnected(PATIENCE.as_secs()));
            }
            std::thread::sleep(TICK);
        }
        let threads = Threads::start(options.cpus, &board, attends, None)?;
        let ffn = Pace::new(clock.clone(), board.clone(), 1);
        let drive = Drive::Processes(threads, process);
        Ok(Self { front: Front::Remote(remote), wire, attention, ffn, clock, board, drive })
    }

    /// Two threads, or both sides in turn, and the scheduler as a value.
    fn of_threads(options: &Options, shape: Shape) -> Result<Self, BenchError> {
        let scheduler = LocalScheduler::new(SchedulerOptions::new(1, 1))?;
        let fabric = (options.clock == super::Clock::Virtual).then(|| {
            let now = Duration::ZERO..Duration::ZERO;
            Fabric::new(FabricOptions { latency: now, maps_peer_memory: true, ..FabricOptions::default() })
        });
        let clocks = [(); 2].map(|()| if fabric.is_some() { Clock::manual() } else { Clock::system() });
        let board = Board::new()?;
        board.schedule(options.scheduling);
        let wire = Wire::new(board.clone());
        let parts = |end: usize| -> Result<Parts, BenchError> {
            let device = match &fabric {
                Some(fabric) => fabric.device(["attention", "ffn"][end]),
                None => side::open(options.provider, &options.device)?,
            };
            let device = wire.between(device, end, clocks[end].clone());
            let endpoint = device.endpoint()?;
            let control = Box::new(scheduler.session(endpoint.waker()));
            Ok((device, endpoint, control))
        };
        let [attention, ffn] = [0, 1].map(|end: usize| Pace::new(clocks[end].clone(), board.clone(), end));
        let mut attends = side::attention(parts(0)?, shape, attention.clone(), clocks[0].clone())?;
        let mut serves = side::ffn(parts(1)?, shape, ffn.clone(), clocks[1].clone())?;
        let deadline = Instant::now() + PATIENCE;
        while !(attends.mesh().is_linked() && attends.mesh().is_complete() && serves.mesh().is_complete()) {
            attends.poll()?;
            serves.poll()?;
            if let Some(fabric) = &fabric {
                clocks.iter().for_each(|clock| clock.advance(TICK));
                fabric.advance(TICK);
            }
            if Instant::now() > deadline {
                return Err(BenchError::NotConnected(PATIENCE.as_secs()));
            }
        }
        let clock = clocks[0].clone();
        let drive = match fabric {
            Some(fabric) => Drive::Turns(Box::new(Turns { fabric, wire: wire.clone(), clocks, attends, serves })),
            None => Drive::Threads(Threads::start(options.cpus, &board, attends, Some(serves))?),
        };
        Ok(Self { front: Front::Local(scheduler), wire, attention, ffn, clock, board, drive })
    }

    /// Decodes a sequence in every microbatch, all at the same pace; the mean time of the tokens behind the first few.
    pub(super) fn run(&mut self, stages: &Stages, tokens: u32) -> Result<Run, BenchError> {
        self.attention.set(stages.attention);
        self.ffn.set(stages.ffn);
        self.wire.set(stages.wire);
        let max_new_tokens = WARM_UP + tokens;
        let deadline = Instant::now() + stages.ideal() * max_new_tokens * 2 + PATIENCE;
        for _ in 0..stages.microbatches {
            let request = GenerateRequest { prompt: vec![0], max_new_tokens, ignore_eos: true, ..Default::default() };
            self.front.generate(request)?;
        }
        let mut counts = std::collections::BTreeMap::new();
        let (mut elapsed, mut timed, mut open) = (Duration::ZERO, 0, usize::from(stages.microbatches));
        let (mut begin, mut end) = (None, None);
        while open > 0 {
            let Some((sequence, news)) = self.front.next()? else {
                if Instant::now() > deadline {
                    return Err(BenchError::Sequence("nothing came in time".into()));
                }
                self.drive.go_on()?;
                continue;
            };
            match news {
                News::Token(since) => {
                    let count = counts.entry(sequence).or_insert(0);
                    *count += 1;
                    let now = self.reached();
                    if *count > WARM_UP {
                        elapsed += since;
                        timed += 1;
                        end = Some(now);
                    } else if *count == WARM_UP {
                        begin = Some(now);
                    }
                }
                News::Other => {}
                News::Finished => open -= 1,
                News::Failed(message) => return Err(BenchError::Sequence(message)),
            }
        }
        let (Some(begin), Some(end)) = (begin, end) else {
            return Err(BenchError::Sequence("a sequence was shorter than asked for".into()));
        };
        Ok(Run {
            token: elapsed / timed.max(1),
            stalled: shares(end.at - begin.at, begin.busy, end.busy).map(|share| (1.0 - share).clamp(0.0, 1.0)),
            cores: shares(end.at - begin.at, begin.cpu, end.cpu),
        })
    }

    /// Has something done while both sides rest.
    pub(super) fn aside<T>(&self, something: impl FnOnce() -> T) -> T {
        self.board.rest(true);
        std::thread::sleep(2 * NAP);
        let done = something();
        self.board.rest(false);
        done
    }

    fn reached(&self) -> Reached {
        let sides = [&self.attention, &self.ffn];
        Reached { at: self.clock.now(), busy: sides.map(Pace::busy), cpu: sides.map(Pace::cpu) }
    }
}

/// What came to the two sides, as shares of a time.
fn shares(time: Duration, before: [Duration; 2], after: [Duration; 2]) -> [f64; 2] {
    [0, 1].map(|side: usize| (after[side] - before[side]).as_secs_f64() / time.as_secs_f64())
}

impl Drive {
    /// Lets the executors go on, for a while.
    fn go_on(&mut self) -> Result<(), BenchError> {
        match self {
            Self::Threads(threads) => {
                std::thread::sleep(LOOK);
                threads.look()
            }
            // News are waited for where they come in.
            Self::Processes(threads, process) => threads.look().and_then(|()| process.look()),
            Self::Turns(turns) => turns.go_on(),
        }
    }
}
