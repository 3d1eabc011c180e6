//! The network's state and its time: who is on it, what is under way, and when it arrives.

use super::delivery::{Answer, Body};
use super::link::{Half, HalfId, State};
use super::numbered::Numbered;
use super::{FabricOptions, Fault, FaultPlan};
use crate::{Clock, Completion, Disconnect, LinkId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// When an event happens; the number orders those of one time.
pub(super) type EventKey = (Instant, u64);

pub(super) enum Event {
    /// A message reaches its receiver.
    Arrival { from: HalfId, to: HalfId, body: Body },
    /// A connect has taken too long.
    Deadline(HalfId),
    /// A half notices that its link is no more.
    Notice(HalfId, Disconnect),
    /// The script says so.
    Fault(Fault),
}

/// An endpoint as the network sees it.
pub(super) struct Station {
    pub(super) device: Arc<str>,
    pub(super) alive: bool,
    /// By the numbers of their links.
    pub(super) halves: Numbered<Half>,
    pub(super) completed: VecDeque<Completion>,
}

/// A stretch of time in which messages between two devices do not arrive.
struct Hold {
    from: String,
    to: String,
    /// One lane, or everything.
    lane: Option<u8>,
    until: Instant,
}

impl Hold {
    fn covers(&self, from: &str, to: &str, lane: Option<u8>) -> bool {
        self.from == from && self.to == to && (self.lane.is_none() || self.lane == lane)
    }
}

pub(super) struct Network {
    pub(super) options: FabricOptions,
    pub(super) clock: Clock,
    /// Tells this fabric's descriptors from another's.
    pub(super) id: u64,
    pub(super) stations: Numbered<Station>,
    random: SmallRng,
    /// In the order of their keys. Most events are scheduled behind all others.
    queue: VecDeque<(EventKey, Event)>,
    next_event: u64,
    /// When each device has sent what it was given, at its bandwidth.
    sending: BTreeMap<Arc<str>, Instant>,
    holds: Vec<Hold>,
    faults: FaultPlan,
}

impl Network {
    pub(super) fn new(options: FabricOptions) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            random: SmallRng::seed_from_u64(options.seed),
            options,
            clock: Clock::manual(),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            stations: Numbered::default(),
            queue: VecDeque::new(),
            next_event: 0,
            sending: BTreeMap::new(),
            holds: Vec::new(),
            faults: FaultPlan::default(),
        }
    }

    pub(super) fn add_station(&mut self, device: Arc<str>) -> u32 {
        self.stations.add(Station { device, alive: true, halves: Numbered::default(), completed: VecDeque::new() })
    }

    pub(super) fn half(&mut self, id: HalfId) -> Option<&mut Half> {
        self.stations.get_mut(id.endpoint)?.halves.get_mut(id.link.0)
    }

    pub(super) fn complete(&mut self, endpoint: u32, completion: Completion) {
        if let Some(station) = self.stations.get_mut(endpoint) {
            station.completed.push_back(completion);
        }
    }

    // Time.

    pub(super) fn next_event(&self) -> Option<Instant> {
        self.queue.front().map(|((at, _), _)| *at)
    }

    /// Lets everything happen that is due, each event at its own time.
    pub(super) fn run(&mut self) {
        let now = self.clock.now();
        while self.next_event().is_some_and(|at| at <= now) {
            let Some(((at, _), event)) = self.queue.pop_front() else { return };
            match event {
                Event::Arrival { from, to, body } => self.deliver(at, from, to, body),
                Event::Deadline(half) => self.give_up(half),
                Event::Notice(half, reason) => self.bereave(half, reason),
                Event::Fault(fault) => self.inject(at, fault),
            }
        }
    }

    pub(super) fn schedule(&mut self, at: Instant, event: Event) -> EventKey {
        let key = (at, self.next_event);
        self.next_event += 1;
        let place = if self.queue.back().is_none_or(|(last, _)| *last < key) {
            self.queue.len()
        } else {
            self.queue.partition_point(|(other, _)| *other < key)
        };
        self.queue.insert(place, (key, event));
        key
    }

    pub(super) fn cancel(&mut self, key: EventKey) {
        if let Ok(place) = self.queue.binary_search_by_key(&key, |(key, _)| *key) {
            self.queue.remove(place);
        }
    }

    pub(super) fn draw(&mut self, range: Range<Duration>) -> Duration {
        if range.is_empty() { range.start } else { self.random.random_range(range) }
    }

    pub(super) fn draw_key(&mut self) -> u64 {
        self.random.random()
    }

    // Messages.

    /// Sends what belongs to no lane; it arrives no earlier than `after`. Returns when.
    pub(super) fn send(
        &mut self,
        at: Instant,
        from: HalfId,
        to: HalfId,
        after: Option<Instant>,
        body: Body,
    ) -> Instant {
        let arrival = self.arrival(at, from, to, None, 0).max(after.unwrap_or(at));
        self.schedule(arrival, Event::Arrival { from, to, body }).0
    }

    /// Sends work on a connected half's lane, after what it sent before; the plan's faults befall it.
    pub(super) fn send_work(&mut self, at: Instant, from: HalfId, lane: u8, bytes: usize, body: Body) {
        let Some(to) = self.half(from).and_then(|half| half.peer) else { return };
        let mut arrival = self.arrival(at, from, to, Some(lane), bytes);
        let lost = self.faults.lost > 0.0 && self.random.random_bool(self.faults.lost.min(1.0));
        if self.faults.late > 0.0 && self.random.random_bool(self.faults.late.min(1.0)) {
            arrival += self.draw(self.faults.lateness.clone());
        }
        let Some(state) = self.half(from).and_then(|half| half.lanes.get_mut(usize::from(lane))) else { return };
        let (was_lost, skew) = (state.lost, state.skew);
        state.lost |= lost;
        state.work_until = state.work_until.max(arrival + skew);
        let arrival = state.work_until;
        if was_lost {
            return;
        }
        if lost {
            self.notice(at, from, &format!("lane {lane} was lost"));
            self.notice(at, to, &format!("lane {lane} was lost"));
            return;
        }
        self.schedule(arrival, Event::Arrival { from, to, body });
    }

    /// Sends an answer to work that came on a lane, after the answers before it.
    pub(super) fn send_answer(&mut self, at: Instant, from: HalfId, to: HalfId, lane: u8, answer: Answer) {
        let arrival = self.arrival(at, from, to, Some(lane), answer.len());
        let state = self.half(from).and_then(|half| half.lanes.get_mut(usize::from(lane)));
        let arrival = state.map_or(arrival, |state| {
            state.answers_until = state.answers_until.max(arrival + state.skew);
            state.answers_until
        });
        self.schedule(arrival, Event::Arrival { from, to, body: Body::Answer { lane, answer } });
    }

    /// When a message of so many bytes would arrive, were it alone on its lane.
    fn arrival(&mut self, at: Instant, from: HalfId, to: HalfId, lane: Option<u8>, bytes: usize) -> Instant {
        let mut sent = at;
        if self.options.bandwidth.is_none() && self.holds.is_empty() {
            return at + self.draw(self.options.latency.clone());
        }
        let devices = (self.device(from), self.device(to));
        if let (Some(rate), Some(sender)) = (self.options.bandwidth, &devices.0) {
            let time = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
            let busy = self.sending.entry(sender.clone()).or_insert(at);
            sent = at.max(*busy) + time;
            *busy = sent;
        }
        let arrival = sent + self.draw(self.options.latency.clone());
        let (Some(from), Some(to)) = devices else { return arrival };
        let held = self.holds.iter().filter(|hold| hold.covers(&from, &to, lane)).map(|hold| hold.until);
        held.fold(arrival, Instant::max)
    }

    fn device(&self, half: HalfId) -> Option<Arc<str>> {
        self.stations.get(half.endpoint).map(|station| station.device.clone())
    }

    // Faults.

    pub(super) fn set_faults(&mut self, plan: FaultPlan) {
        let now = self.clock.now();
        for (after, fault) in &plan.script {
            self.schedule(now + *after, Event::Fault(fault.clone()));
        }
        self.faults = plan;
    }

    pub(super) fn inject(&mut self, at: Instant, fault: Fault) {
        match fault {
            Fault::Kill { device } => self.kill(at, &device),
            Fault::BreakLinks { a, b } => {
                for half in self.between(&a, &b) {
                    for lane in self.half(half).into_iter().flat_map(|half| &mut half.lanes) {
                        lane.lost = true;
                    }
                    self.drop_from(half);
                    self.notice(at, half, "the link broke");
                }
            }
            Fault::HoldLane { from, to, lane, time } => {
                self.hold(at, Hold { from, to, lane: Some(lane), until: at + time });
            }
            Fault::Partition { a, b, time } => {
                if time > self.options.silence {
                    let silence = self.options.silence;
                    for half in self.between(&a, &b) {
                        let gone = Disconnect::PeerGone(format!("it has been silent for {silence:?}"));
                        self.schedule(at + silence, Event::Notice(half, gone));
                    }
                }
                self.hold(at, Hold { from: a.clone(), to: b.clone(), lane: None, until: at + time });
                self.hold(at, Hold { from: b, to: a, lane: None, until: at + time });
            }
        }
    }

    fn kill(&mut self, at: Instant, device: &str) {
        let mut bereft = Vec::new();
        for station in self.stations.things_mut().filter(|station| *station.device == *device) {
            station.alive = false;
            station.completed.clear();
            bereft.extend(station.halves.clear().filter_map(|half| half.peer));
        }
        for peer in bereft {
            self.notice(at, peer, &format!("`{device}` was killed"));
        }
    }

    /// Has a half notice, after a while, that its peer is gone.
    fn notice(&mut self, at: Instant, half: HalfId, why: &str) {
        let noticed = at + self.draw(self.options.detection.clone());
        self.schedule(noticed, Event::Notice(half, Disconnect::PeerGone(why.into())));
    }

    /// The connected halves, on both devices, of the links between two.
    fn between(&self, a: &str, b: &str) -> Vec<HalfId> {
        let mut found = Vec::new();
        for (endpoint, station) in self.stations.iter() {
            for (link, half) in station.halves.iter().filter(|(_, half)| half.state == State::Connected) {
                let peer = half.peer.and_then(|peer| self.device(peer));
                if peer
                    .is_some_and(|peer| matches!((&*station.device, &*peer), pair if pair == (a, b) || pair == (b, a)))
                {
                    found.push(HalfId { endpoint, link: LinkId(link) });
                }
            }
        }
        found
    }

    /// Drops what a half has under way.
    fn drop_from(&mut self, half: HalfId) {
        self.queue.retain(|(_, event)| !matches!(event, Event::Arrival { from, .. } if *from == half));
    }

    /// Holds up what is under way, in its order, and what will be sent.
    fn hold(&mut self, at: Instant, hold: Hold) {
        self.holds.retain(|hold| hold.until > at);
        let queue = std::mem::take(&mut self.queue);
        let covered = |key: &EventKey, event: &Event| match event {
            Event::Arrival { from, to, body } if key.0 <= hold.until => {
                let (from, to) = (self.device(*from), self.device(*to));
                from.zip(to).is_some_and(|(from, to)| hold.covers(&from, &to, body.lane()))
            }
            _ => false,
        };
        let (late, rest): (VecDeque<_>, _) = queue.into_iter().partition(|(key, event)| covered(key, event));
        self.queue = rest;
        for (_, event) in late {
            self.schedule(hold.until, event);
        }
        self.holds.push(hold);
    }
}
