//! The control plane between members and the scheduler's state: messages take their time, in order.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{Control, ControlError, ControlEvent};
use stepmesh_mesh::scheduler::{Action, SchedulerOptions, Session, State};
use stepmesh_proto::control::FromMember;
use stepmesh_transport::Clock;

type Queue<T> = VecDeque<(Instant, T)>;

#[derive(Default)]
struct Wire {
    to_scheduler: BTreeMap<Session, Queue<FromMember>>,
    to_member: BTreeMap<Session, Queue<ControlEvent>>,
}

/// A member's end.
pub(crate) struct SimControl {
    session: Session,
    wire: Arc<Mutex<Wire>>,
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
        let (due, _) = queue.front()?;
        if *due > now { None } else { queue.pop_front().map(|(_, event)| event) }
    }
}

fn draw(random: &mut SmallRng, range: &Range<Duration>) -> Duration {
    if range.is_empty() { range.start } else { random.random_range(range.clone()) }
}

fn push<T>(queue: &mut Queue<T>, due: Instant, value: T) {
    let due = queue.back().map_or(due, |(last, _)| due.max(*last));
    queue.push_back((due, value));
}

/// The scheduler and the wires to it.
pub(crate) struct Plane {
    pub(crate) state: State,
    wire: Arc<Mutex<Wire>>,
    clock: Clock,
    random: SmallRng,
    latency: Range<Duration>,
}

impl Plane {
    pub(crate) fn new(attention: u32, ffn: u32, clock: Clock, latency: Range<Duration>, seed: u64) -> Self {
        let options = SchedulerOptions {
            heartbeat: Duration::from_secs(10_000),
            loss: Duration::from_secs(100_000),
            ..SchedulerOptions::new(attention, ffn)
        };
        let mut counter = 0_u128;
        let secrets = Box::new(move || {
            counter += 1;
            Ok(counter.to_le_bytes())
        });
        let state = State::new(options, secrets).unwrap();
        Self { state, wire: Arc::default(), clock, random: SmallRng::seed_from_u64(seed), latency }
    }

    pub(crate) fn connect(&mut self) -> (Session, SimControl) {
        let session = self.state.connected(self.clock.now());
        let control = SimControl {
            session,
            wire: self.wire.clone(),
            clock: self.clock.clone(),
            random: SmallRng::seed_from_u64(self.random.random()),
            latency: self.latency.clone(),
        };
        (session, control)
    }

    pub(crate) fn disconnect(&mut self, session: Session) {
        self.state.disconnected(session, "its process died");
        self.act();
    }

    /// The scheduler vanishes: the member is told so.
    pub(crate) fn vanish(&mut self, session: Session) {
        let mut wire = self.wire.lock().unwrap();
        let lost = ControlEvent::Lost("connection reset".into());
        push(wire.to_member.entry(session).or_default(), self.clock.now(), lost);
    }

    /// Delivers what is due.
    pub(crate) fn relay(&mut self) {
        let now = self.clock.now();
        loop {
            let mut wire = self.wire.lock().unwrap();
            let due = wire.to_scheduler.iter_mut().find_map(|(session, queue)| {
                let (due, _) = queue.front()?;
                if *due > now { None } else { queue.pop_front().map(|(_, message)| (*session, message)) }
            });
            drop(wire);
            let Some((session, message)) = due else { break };
            self.state.message(session, message, now);
            self.act();
        }
        self.state.tick(now);
        self.act();
    }

    fn act(&mut self) {
        while let Some(action) = self.state.next_action() {
            let due = self.clock.now() + draw(&mut self.random, &self.latency);
            let mut wire = self.wire.lock().unwrap();
            let (session, event) = match action {
                Action::Send { session, message } => (session, ControlEvent::Message(message)),
                Action::End { session, reason } => (session, ControlEvent::Lost(reason)),
                _ => continue,
            };
            push(wire.to_member.entry(session).or_default(), due, event);
        }
    }

    /// When the next message is due or the scheduler's next deadline.
    pub(crate) fn next_event(&self) -> Option<Instant> {
        let wire = self.wire.lock().unwrap();
        let to_scheduler = wire.to_scheduler.values().filter_map(|queue| queue.front().map(|(due, _)| *due));
        let to_member = wire.to_member.values().filter_map(|queue| queue.front().map(|(due, _)| *due));
        let now = self.clock.now();
        // What a dead member does not fetch is no event.
        to_scheduler.chain(to_member.filter(|due| *due > now)).chain(self.state.next_tick()).min()
    }
}
