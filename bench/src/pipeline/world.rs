//! A deployment of one attention and one FFN executor, and sequences through it. The two run each on a thread of its own by
//! the machine's clock, or in turn by clocks of their own over the simulated network.

use super::Options;
use super::stages::{Pace, SyntheticAttention, SyntheticFfn, config};
use super::threads::Threads;
use super::turns::Turns;
use super::wire::Wire;
use crate::BenchError;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{LocalControl, LocalScheduler};
use stepmesh_mesh::scheduler::SchedulerOptions;
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, Policy};
use stepmesh_model::{Dtype, ModelConfig};
use stepmesh_pipeline::{AttentionExecutor, FfnExecutor, Stages, slot_layout, workload};
use stepmesh_proto::control::GenerateRequest;
use stepmesh_proto::control::sequence_event::Body;
use stepmesh_transport::mem::{Fabric, FabricOptions};
use stepmesh_transport::{Clock, Device, DeviceOptions, Endpoint};

/// Longer than an end ever spins: it has its CPU to itself.
const SPIN: Duration = Duration::from_secs(1);
/// A step of the virtual clocks while the members join.
const TICK: Duration = Duration::from_millis(1);
/// Beyond the time that a run should take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Tokens of each sequence before those that are timed: the pipeline fills.
const WARM_UP: u32 = 2;
/// Room for the longest run.
const KV_TOKENS: usize = 64 * 1024;

pub(super) struct World {
    scheduler: LocalScheduler,
    wire: Wire,
    attention: Pace,
    ffn: Pace,
    /// The attention side's.
    clock: Clock,
    drive: Drive,
}

/// Who runs the executors.
enum Drive {
    Threads(Threads),
    Turns(Box<Turns>),
}

/// What a run came to.
pub(super) struct Run {
    /// Time per output token.
    pub(super) token: Duration,
    /// Shares of the time in which the two sides did not compute.
    pub(super) stalled: [f64; 2],
}

type Parts = (MemberOptions, Arc<dyn Device>, Box<dyn Endpoint>, Box<LocalControl>);

impl World {
    /// Joins both sides and sets their threads going.
    pub(super) fn start(options: &Options, layers: u32, microbatches: u16) -> Result<Self, BenchError> {
        let config = config(layers)?;
        let scheduler = LocalScheduler::new(SchedulerOptions::new(1, 1))?;
        let fabric = (options.clock == super::Clock::Virtual).then(|| {
            let now = Duration::ZERO..Duration::ZERO;
            Fabric::new(FabricOptions { latency: now, maps_peer_memory: true, ..FabricOptions::default() })
        });
        let clocks = [(); 2].map(|()| if fabric.is_some() { Clock::manual() } else { Clock::system() });
        let wire = Wire::default();
        let parts = |end: usize| -> Result<Parts, BenchError> {
            let device = match &fabric {
                Some(fabric) => fabric.device(["attention", "ffn"][end]),
                None => {
                    let spinning = DeviceOptions { spin: SPIN, ..options.device.clone() };
                    stepmesh_transport::open(options.provider, &spinning)?
                }
            };
            let device = wire.between(device, end, clocks[end].clone());
            let endpoint = device.endpoint()?;
            let control = Box::new(scheduler.session(endpoint.waker()));
            let layout = slot_layout(&config, stepmesh_pipeline::Wire::of(Dtype::F32), microbatches, 1)?;
            Ok((
                MemberOptions::new(layout, workload(&config, Dtype::F32, stepmesh_pipeline::Wire::of(Dtype::F32), 1)),
                device,
                endpoint,
                control,
            ))
        };
        let [attention, ffn] = clocks.each_ref().map(|clock| Pace::new(clock.clone()));
        let (member, device, endpoint, control) = parts(0)?;
        let mesh = AttentionMesh::with_endpoint(member, device, endpoint, control, clocks[0].clone())?;
        let stage = Box::new(SyntheticAttention { config: config.clone(), pace: attention.clone() });
        let queue = usize::from(microbatches);
        let mut attends = AttentionExecutor::new(
            mesh,
            stage,
            stepmesh_pipeline::Wire::of(Dtype::F32),
            KV_TOKENS,
            microbatches,
            1,
            queue,
        )?;
        let (member, device, endpoint, control) = parts(1)?;
        let mesh = FfnMesh::with_endpoint(member, device, endpoint, control, clocks[1].clone())?;
        let stage = Box::new(SyntheticFfn { config: ModelConfig::clone(&config), pace: ffn.clone() });
        let mut serves = FfnExecutor::new(mesh, stage, stepmesh_pipeline::Wire::of(Dtype::F32), Policy::All);
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
            None => Drive::Threads(Threads::start(options.cpus, attends, serves)?),
        };
        Ok(Self { scheduler, wire, attention, ffn, clock, drive })
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
            self.scheduler.generate(request).map_err(|refusal| BenchError::Sequence(refusal.to_string()))?;
        }
        let mut counts = std::collections::BTreeMap::new();
        let (mut elapsed, mut timed, mut open) = (Duration::ZERO, 0, usize::from(stages.microbatches));
        let mut begin = None;
        let mut end = None;
        while open > 0 {
            let Some((sequence, event)) = self.scheduler.next_sequence_event() else {
                if Instant::now() > deadline {
                    return Err(BenchError::Sequence("nothing came in time".into()));
                }
                self.drive.go_on()?;
                continue;
            };
            match event {
                Body::Token(token) => {
                    let count = counts.entry(sequence).or_insert(0);
                    *count += 1;
                    let now = (self.clock.now(), self.attention.busy(), self.ffn.busy());
                    if *count > WARM_UP {
                        elapsed += Duration::from_nanos(token.elapsed_ns);
                        timed += 1;
                        end = Some(now);
                    } else if *count == WARM_UP {
                        begin = Some(now);
                    }
                }
                Body::Scores(_) => {}
                Body::Finished(_) => open -= 1,
                Body::Failed(failed) => return Err(BenchError::Sequence(failed.message)),
            }
        }
        let stalled = match (begin, end) {
            (Some((begin, a0, f0)), Some((end, a1, f1))) => {
                let share = |busy: Duration| (1.0 - busy.as_secs_f64() / (end - begin).as_secs_f64()).clamp(0.0, 1.0);
                [share(a1 - a0), share(f1 - f0)]
            }
            _ => [0.0; 2],
        };
        Ok(Run { token: elapsed / timed.max(1), stalled })
    }
}

impl Drive {
    /// Lets the executors go on, for a while.
    fn go_on(&mut self) -> Result<(), BenchError> {
        match self {
            Self::Threads(threads) => threads.go_on(),
            Self::Turns(turns) => turns.go_on(),
        }
    }
}
