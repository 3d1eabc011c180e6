//! A whole deployment in one thread on a virtual clock: the scheduler's state machine, the members, the fabric between
//! them, a control plane with delays. Everything that decides is the code that ships.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{Control, ControlError, ControlEvent};
use stepmesh_mesh::scheduler::{Action, GenerateRefusal, SchedulerOptions, SequenceId, Session, State};
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, Policy};
use stepmesh_model::{AttentionStage, Dtype, FfnStage};
use stepmesh_pipeline::{AttentionExecutor, AttentionSide, FfnExecutor, FfnSide, Step, Wire, slot_layout, workload};
use stepmesh_proto::control::{FromMember, GenerateRequest, sequence_event::Body};
use stepmesh_transport::Clock;
use stepmesh_transport::mem::{Fabric, FabricOptions};

/// A deployment's shape and manners.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) wire: Wire,
    pub(crate) seed: u64,
    pub(crate) attention: u32,
    pub(crate) ffn: u32,
    pub(crate) microbatches: u16,
    pub(crate) max_rows: u32,
    pub(crate) lanes: u8,
    pub(crate) maps_peer_memory: bool,
    pub(crate) latency: Range<Duration>,
    pub(crate) control_latency: Range<Duration>,
}

/// How a sequence ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    Finished,
    Failed(String),
}

/// What a client has seen of its sequence.
#[derive(Clone, Debug, Default)]
pub(crate) struct Client {
    pub(crate) tokens: Vec<u32>,
    pub(crate) scores: Vec<f32>,
    pub(crate) outcome: Option<Outcome>,
}

type Queue<T> = VecDeque<(Instant, T)>;

#[derive(Default)]
struct ControlWire {
    to_scheduler: BTreeMap<Session, Queue<FromMember>>,
    to_member: BTreeMap<Session, Queue<ControlEvent>>,
}

/// A member's session: messages take their time, in order.
struct SimControl {
    session: Session,
    wire: Arc<Mutex<ControlWire>>,
    clock: Clock,
    random: SmallRng,
    latency: Range<Duration>,
}

impl Control for SimControl {
    fn send(&mut self, message: FromMember) -> Result<(), ControlError> {
        let due = self.clock.now() + draw(&mut self.random, &self.latency);
        push(self.wire.lock().unwrap().to_scheduler.entry(self.session).or_default(), due, message);
        Ok(())
    }

    fn poll(&mut self) -> Option<ControlEvent> {
        let now = self.clock.now();
        let mut wire = self.wire.lock().unwrap();
        let queue = wire.to_member.get_mut(&self.session)?;
        queue.front().is_some_and(|(due, _)| *due <= now).then(|| queue.pop_front()).flatten().map(|(_, event)| event)
    }
}

fn draw(random: &mut SmallRng, range: &Range<Duration>) -> Duration {
    if range.is_empty() { range.start } else { random.random_range(range.clone()) }
}

fn push<T>(queue: &mut Queue<T>, due: Instant, value: T) {
    let due = queue.back().map_or(due, |(last, _)| due.max(*last));
    queue.push_back((due, value));
}

enum Node {
    Attention(Box<AttentionExecutor>),
    Ffn(Box<FfnExecutor>),
}

struct Place {
    device: String,
    session: Session,
    node: Option<Node>,
}

pub(crate) struct World {
    pub(crate) fabric: Fabric,
    pub(crate) random: SmallRng,
    pub(crate) clients: BTreeMap<SequenceId, Client>,
    shape: Shape,
    clock: Clock,
    scheduler: State,
    wire: Arc<Mutex<ControlWire>>,
    places: Vec<Place>,
    control_random: SmallRng,
}

/// What the nodes compute with; shared by all deployments of a test.
pub(crate) trait Stages {
    fn attention(&self) -> Box<dyn AttentionStage>;
    fn ffn(&self, rank: usize, count: usize) -> Box<dyn FfnStage>;
}

impl World {
    pub(crate) fn new(shape: Shape, stages: &dyn Stages) -> Self {
        let mut random = SmallRng::seed_from_u64(shape.seed);
        let fabric = Fabric::new(FabricOptions {
            seed: random.random(),
            latency: shape.latency.clone(),
            lane_skew: Duration::ZERO..Duration::from_micros(random.random_range(1..200)),
            maps_peer_memory: shape.maps_peer_memory,
            ..FabricOptions::default()
        });
        let options = SchedulerOptions {
            heartbeat: Duration::from_secs(1000),
            loss: Duration::from_secs(100_000),
            ..SchedulerOptions::new(shape.attention, shape.ffn)
        };
        let mut counter = 0_u128;
        let secrets = Box::new(move || {
            counter += 1;
            Ok(counter.to_le_bytes())
        });
        let scheduler = State::new(options, secrets).unwrap();
        let clock = fabric.clock();
        let control_random = SmallRng::seed_from_u64(random.random());
        let mut world = Self {
            fabric,
            random,
            clients: BTreeMap::new(),
            shape,
            clock,
            scheduler,
            wire: Arc::default(),
            places: Vec::new(),
            control_random,
        };
        for rank in 0..world.shape.attention {
            world.start_attention(rank, stages);
        }
        for rank in 0..world.shape.ffn {
            world.start_ffn(rank, stages);
        }
        world
    }

    fn member(&mut self, name: &str, rank: u32, stage: &dyn AttentionStage) -> (MemberOptions, Session, SimControl) {
        let config = stage.config();
        let layout = slot_layout(config, self.shape.wire, self.shape.microbatches, self.shape.max_rows).unwrap();
        let mut options = MemberOptions::new(layout, workload(config, Dtype::F32, Wire::of(Dtype::F32), 1));
        options.name = name.into();
        options.rank = Some(rank);
        options.lanes = self.shape.lanes;
        options.stripe_bytes = 1;
        let session = self.scheduler.connected(self.clock.now());
        let control = SimControl {
            session,
            wire: self.wire.clone(),
            clock: self.clock.clone(),
            random: SmallRng::seed_from_u64(self.random.random()),
            latency: self.shape.control_latency.clone(),
        };
        (options, session, control)
    }

    pub(crate) fn start_attention(&mut self, rank: u32, stages: &dyn Stages) {
        let device = format!("attention-{rank}-{}", self.places.len());
        let stage = stages.attention();
        let (options, session, control) = self.member(&device, rank, stage.as_ref());
        let (microbatches, max_rows) = (self.shape.microbatches, self.shape.max_rows);
        let fabric_device = self.fabric.device(device.as_str());
        let mesh = AttentionMesh::new(options, fabric_device, Box::new(control), self.clock.clone()).unwrap();
        let (side, wire) = (AttentionSide::Host(stage), self.shape.wire);
        let executor = AttentionExecutor::new(mesh, side, wire, 4096, microbatches, max_rows, 64).unwrap();
        self.places.push(Place { device, session, node: Some(Node::Attention(Box::new(executor))) });
    }

    pub(crate) fn start_ffn(&mut self, rank: u32, stages: &dyn Stages) {
        let device = format!("ffn-{rank}-{}", self.places.len());
        let attention = stages.attention();
        let (options, session, control) = self.member(&device, rank, attention.as_ref());
        let fabric_device = self.fabric.device(device.as_str());
        let mesh = FfnMesh::new(options, fabric_device, Box::new(control), self.clock.clone()).unwrap();
        let stage = stages.ffn(rank as usize, self.shape.ffn as usize);
        let executor = FfnExecutor::new(mesh, FfnSide::Host(stage), self.shape.wire, Policy::All).unwrap();
        self.places.push(Place { device, session, node: Some(Node::Ffn(Box::new(executor))) });
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.scheduler.status().complete
    }

    pub(crate) fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Starts a sequence; a refusal is its outcome.
    pub(crate) fn generate(&mut self, request: GenerateRequest) -> Result<SequenceId, GenerateRefusal> {
        let sequence = self.scheduler.generate(request)?;
        self.clients.insert(sequence, Client::default());
        self.act();
        Ok(sequence)
    }

    /// A process dies as by `kill -9`. Returns what it was: the side and whether there was such a place alive.
    pub(crate) fn kill(&mut self, place: usize) -> Option<(bool, u32)> {
        let place = &mut self.places[place];
        let node = place.node.take()?;
        let (is_attention, rank) = match node {
            Node::Attention(mut executor) => (true, executor.mesh().rank()),
            Node::Ffn(mut executor) => (false, executor.mesh().rank()),
        };
        self.fabric.kill(&place.device);
        self.scheduler.disconnected(place.session, "its process died");
        self.act();
        Some((is_attention, rank.unwrap_or_default()))
    }

    pub(crate) fn places(&self) -> usize {
        self.places.len()
    }

    /// Cancels the ticket of some microbatch of some attention instance, if one is outstanding.
    pub(crate) fn cancel_somewhere(&mut self) -> bool {
        let microbatch = self.random.random_range(0..self.shape.microbatches) as usize;
        let place = self.random.random_range(0..self.places.len());
        match &mut self.places[place].node {
            Some(Node::Attention(executor)) => executor.cancel_microbatch(microbatch),
            _ => false,
        }
    }

    pub(crate) fn break_some_links(&mut self) {
        let (a, b) = (self.random.random_range(0..self.places.len()), self.random.random_range(0..self.places.len()));
        self.fabric.break_links(&self.places[a].device, &self.places[b].device);
    }

    pub(crate) fn cancel_client(&mut self, sequence: SequenceId) {
        self.scheduler.cancel(sequence);
        self.act();
    }

    /// Everyone does what there is to do now; if nobody has anything, time goes on to the next event.
    pub(crate) fn turn(&mut self) {
        let now = self.clock.now();
        let mut busy = self.relay(now);
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        for index in 0..order.len() {
            let other = self.random.random_range(index..order.len());
            order.swap(index, other);
        }
        for index in order {
            busy |= match &mut self.places[index].node {
                Some(Node::Attention(executor)) => executor.poll().unwrap() == Step::Worked,
                Some(Node::Ffn(executor)) => executor.poll().unwrap() == Step::Worked,
                None => false,
            };
        }
        if busy {
            // Computing takes time too.
            self.fabric.advance(Duration::from_micros(self.random.random_range(1..50)));
            return;
        }
        let wire = self.wire.lock().unwrap();
        let queued = wire.to_scheduler.values().filter_map(|queue| queue.front().map(|(due, _)| *due));
        let control =
            queued.chain(wire.to_member.values().filter_map(|queue| queue.front().map(|(due, _)| *due))).min();
        drop(wire);
        let next = [self.fabric.next_event(), control, self.scheduler.next_tick()].into_iter().flatten().min();
        // Members have time-outs of their own, which nobody announces.
        let step = next.map_or(Duration::from_millis(1), |next| next.saturating_duration_since(now));
        self.fabric.advance(step.clamp(Duration::from_nanos(1), Duration::from_millis(1)));
    }

    /// Delivers control messages that are due. True if there were any.
    fn relay(&mut self, now: Instant) -> bool {
        let mut busy = false;
        loop {
            let mut wire = self.wire.lock().unwrap();
            let due = wire.to_scheduler.iter_mut().find_map(|(session, queue)| {
                let (due, _) = queue.front()?;
                (*due <= now).then(|| queue.pop_front().map(|(_, message)| (*session, message))).flatten()
            });
            drop(wire);
            let Some((session, message)) = due else { break };
            self.scheduler.message(session, message, now);
            self.act();
            busy = true;
        }
        self.scheduler.tick(now);
        self.act();
        busy
    }

    fn act(&mut self) {
        while let Some(action) = self.scheduler.next_action() {
            let due = self.clock.now() + draw(&mut self.control_random, &self.shape.control_latency);
            let mut wire = self.wire.lock().unwrap();
            match action {
                Action::Send { session, message } => {
                    push(wire.to_member.entry(session).or_default(), due, ControlEvent::Message(message));
                }
                Action::End { session, reason } => {
                    push(wire.to_member.entry(session).or_default(), due, ControlEvent::Lost(reason));
                }
                Action::Deliver { sequence, event } => {
                    let Some(client) = self.clients.get_mut(&sequence) else { continue };
                    assert!(client.outcome.is_none(), "an event after the end");
                    match event {
                        Body::Token(token) => client.tokens.push(token.token),
                        Body::Scores(scores) => client.scores.extend(scores.log_probabilities),
                        Body::Finished(_) => client.outcome = Some(Outcome::Finished),
                        Body::Failed(failed) => {
                            client.outcome = Some(Outcome::Failed(format!("{:?}: {}", failed.kind(), failed.message)));
                        }
                    }
                }
                Action::Answer { .. } | Action::Note(_) => {}
            }
        }
    }
}
