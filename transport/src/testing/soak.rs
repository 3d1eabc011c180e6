//! Many transfers of random sizes, offsets and lanes, both ways at once, with checksums from end to end.
//!
//! Each end sends into the free slots of a region of its peer. The immediate that closes a transfer names its slot, and
//! an immediate back gives the slot away again. What is sent is noted beside the link, lane by lane, so that a transfer
//! that is lost, doubled, overtaken or damaged is found out.

use super::Fixture;
use super::world::{A, B, End, Link, PATIENCE, World, notify, pattern, work, write, write_immediate};
use crate::{Access, Completion, LinkId, Op, PostError, Region, Remote, RemoteRegion, Source, Work};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Transfers that one end has under way at most, each in a slot of its own.
const SLOTS: usize = 16;
/// Marks an immediate that gives a slot back.
const GIVEN_BACK: u32 = 1 << 31;

/// What [`soak`] sends.
#[derive(Clone, Copy, Debug)]
pub struct Soak {
    /// Transfers in all; each end sends half of them.
    pub transfers: usize,
    /// Bytes of the largest. Sizes are log-uniform, from nothing on.
    pub largest: usize,
    /// Lanes of the link, if the device has so many.
    pub lanes: u8,
    /// Of all draws.
    pub seed: u64,
    /// Each end on a thread of its own that sleeps when it has nothing to do. Not for a virtual clock.
    pub threads: bool,
}

impl Default for Soak {
    /// Of a length that suits a test run.
    fn default() -> Self {
        Self { transfers: 4000, largest: 20_000, lanes: 4, seed: 1, threads: false }
    }
}

/// A short [`soak`] on one thread.
pub fn survives_a_random_soak(fixture: &mut dyn Fixture) {
    soak(fixture, &Soak::default());
}

/// Sends it all, and compares the checksum of every transfer on arrival.
pub fn soak(fixture: &mut dyn Fixture, soak: &Soak) {
    let lanes = fixture.device().properties().max_lanes.min(soak.lanes);
    let (mut world, link) = World::connected(fixture, lanes);
    let granted = [B, A].map(|granter| world.grant(link, granter, SLOTS * soak.largest.max(1), Access::PeerWrite));
    let journals = [A, B].map(|_| Journal::new(lanes));
    let World { ends, fixture } = world;
    let Link(ids) = link;
    let mut ends = ends.into_iter();
    let mut parties = [A, B].map(|this| {
        let other = 1 - this;
        let end = ends.next().expect("two ends");
        let (target, landing) = (granted[this].remote.clone(), granted[other].region.clone());
        let shares = [soak.transfers.div_ceil(2), soak.transfers / 2];
        Party {
            random: SmallRng::seed_from_u64(soak.seed + this as u64),
            inline: end.device.properties().max_inline,
            source: end.source(soak.seed + this as u64, 2 * soak.largest.max(1)),
            bytes: pattern(soak.seed + this as u64, 2 * soak.largest.max(1)),
            end: End { seen: Vec::new(), ..end },
            link: ids[this],
            lanes,
            largest: soak.largest,
            landing,
            target,
            sent: &journals[this],
            expected: &journals[other],
            free: (0..SLOTS).collect(),
            next: None,
            to_send: shares[this],
            to_receive: shares[other],
            to_give_back: VecDeque::new(),
            unreported: 0,
        }
    });
    if soak.threads {
        let done = AtomicUsize::new(0);
        std::thread::scope(|scope| parties.each_mut().map(|party| scope.spawn(|| party.live(&done))).map(drop));
    } else {
        take_turns(&mut parties, fixture);
    }
    assert!(journals.iter().all(Journal::is_empty));
}

/// Both ends on this thread, until both are done.
fn take_turns(parties: &mut [Party<'_>; 2], fixture: &mut dyn Fixture) {
    let clock = fixture.clock();
    let mut deadline = clock.now() + PATIENCE;
    while !parties.iter().all(Party::is_done) {
        if parties.each_mut().map(Party::turn).contains(&true) {
            deadline = clock.now() + PATIENCE;
        } else {
            assert!(clock.now() < deadline, "nothing arrives any more: {parties:?}");
            fixture.pass();
        }
    }
}

/// A transfer as it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Note {
    slot: usize,
    start: usize,
    len: usize,
    checksum: u32,
}

/// What one end has sent and the other not yet received, by lane.
struct Journal(Vec<Mutex<VecDeque<Note>>>);

impl Journal {
    fn new(lanes: u8) -> Self {
        Self((0..lanes).map(|_| Mutex::default()).collect())
    }

    fn lane<R>(&self, lane: u8, f: impl FnOnce(&mut VecDeque<Note>) -> R) -> R {
        f(&mut self.0[usize::from(lane)].lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_empty(&self) -> bool {
        (0..).zip(&self.0).all(|(lane, _)| self.lane(lane, |notes| notes.is_empty()))
    }
}

/// How a transfer is posted.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// Inline bytes, then a bare immediate.
    Inline,
    /// A signalled write, then a bare immediate.
    Signalled,
    /// A write with its immediate.
    Whole,
    /// Produced in the peer's memory, then as `Whole`.
    InPlace,
}

/// A transfer that was drawn and noted, and waits to be posted.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    note: Note,
    lane: u8,
    /// Where its bytes begin in the source.
    from: usize,
    manner: Manner,
}

/// One end, and what it still has to do.
struct Party<'a> {
    end: End,
    link: LinkId,
    lanes: u8,
    inline: usize,
    random: SmallRng,
    largest: usize,
    /// What is sent: any stretch of it. Never changes.
    source: Region,
    /// The same bytes.
    bytes: Vec<u8>,
    /// Where the peer's bytes arrive.
    landing: Region,
    target: RemoteRegion,
    sent: &'a Journal,
    expected: &'a Journal,
    free: Vec<usize>,
    next: Option<Transfer>,
    to_send: usize,
    to_receive: usize,
    to_give_back: VecDeque<usize>,
    /// Signals that have not been reported.
    unreported: usize,
}

impl std::fmt::Debug for Party<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Party")
            .field("to_send", &self.to_send)
            .field("next", &self.next)
            .field("under_way", &(SLOTS - self.free.len()))
            .field("to_receive", &self.to_receive)
            .field("to_give_back", &self.to_give_back.len())
            .field("unreported", &self.unreported)
            .finish()
    }
}

impl Party<'_> {
    /// Takes turns until both ends are done.
    fn live(&mut self, done: &AtomicUsize) {
        let mut counted = false;
        let mut deadline = Instant::now() + PATIENCE;
        while done.load(Ordering::Acquire) < 2 {
            if self.turn() {
                deadline = Instant::now() + PATIENCE;
            } else {
                assert!(Instant::now() < deadline, "nothing arrives any more: {self:?}");
                self.end.endpoint.wait(Duration::from_millis(1)).expect("wait");
            }
            if !counted && self.is_done() {
                counted = true;
                done.fetch_add(1, Ordering::Release);
            }
        }
    }

    fn is_done(&self) -> bool {
        let open = self.to_send + self.to_receive + self.to_give_back.len() + self.unreported;
        open == 0 && self.next.is_none() && self.free.len() == SLOTS
    }

    /// Gives slots back, sends, receives; whether anything could be done.
    fn turn(&mut self) -> bool {
        let mut progress = false;
        while let Some(&slot) = self.to_give_back.front()
            && self.post(self.lane_back(slot), &[work(notify(slot as u32 | GIVEN_BACK))])
        {
            self.to_give_back.pop_front();
            progress = true;
        }
        if self.next.is_none() && self.to_send > 0 && !self.free.is_empty() {
            self.next = Some(self.draw());
            self.to_send -= 1;
        }
        if let Some(transfer) = self.next
            && self.send(&transfer)
        {
            self.next = None;
            progress = true;
        }
        progress |= self.end.poll();
        for completion in std::mem::take(&mut self.end.seen) {
            match completion {
                Completion::Immediate { immediate, .. } if immediate & GIVEN_BACK != 0 => {
                    let slot = (immediate & !GIVEN_BACK) as usize;
                    assert!(slot < SLOTS && !self.free.contains(&slot), "slot {slot} was given back twice");
                    self.free.push(slot);
                }
                Completion::Immediate { lane, immediate, .. } => self.receive(lane, immediate as usize),
                Completion::Sent { result: Ok(()), .. } => self.unreported -= 1,
                other => panic!("{other:?}"),
            }
        }
        progress
    }

    fn lane_back(&self, slot: usize) -> u8 {
        (slot % usize::from(self.lanes)) as u8
    }

    /// Draws the next transfer, and notes it.
    fn draw(&mut self) -> Transfer {
        let random = &mut self.random;
        let slot = self.free.swap_remove(random.random_range(0..self.free.len()));
        let len = ((self.largest + 2) as f64).powf(random.random::<f64>()) as usize - 1;
        let len = len.min(self.largest);
        let start = slot * self.largest + random.random_range(0..=self.largest - len);
        let from = random.random_range(0..=self.bytes.len() - len);
        let lane = random.random_range(0..self.lanes);
        let manner = match random.random_range(0..4) {
            0 if len <= self.inline => Manner::Inline,
            1 => Manner::Signalled,
            2 if self.target.mapped.is_some() => Manner::InPlace,
            _ => Manner::Whole,
        };
        let note = Note { slot, start, len, checksum: crc32c::crc32c(&self.bytes[from..from + len]) };
        self.sent.lane(lane, |notes| notes.push_back(note));
        Transfer { note, lane, from, manner }
    }

    /// Posts a transfer; says no if the lane is full.
    fn send(&mut self, transfer: &Transfer) -> bool {
        let &Transfer { note: Note { slot, start, len, .. }, lane, from, manner } = transfer;
        let (source, target, bytes) = (self.source.clone(), self.target.clone(), from..from + len);
        let (offset, immediate) = (start as u64, slot as u32);
        match manner {
            Manner::Inline => {
                let inline = self.bytes[bytes].to_vec();
                let remote = Remote { region: &target, offset };
                let payload = Op::Write { source: Source::Inline(&inline), remote };
                self.post(lane, &[work(payload), work(notify(immediate))])
            }
            Manner::Signalled => {
                let payload = Work { op: write(&source, bytes, &target, offset), signal: Some(1) };
                let posted = self.post(lane, &[payload, work(notify(immediate))]);
                self.unreported += usize::from(posted);
                posted
            }
            Manner::Whole => self.post(lane, &[work(write_immediate(&source, bytes, &target, offset, immediate))]),
            Manner::InPlace => {
                let mapped = target.mapped.as_ref().expect("drawn only where it is mapped");
                mapped.write(start, &self.bytes[bytes]).expect("in bounds");
                self.post(lane, &[work(write_immediate(mapped, start..start + len, &target, offset, immediate))])
            }
        }
    }

    fn post(&mut self, lane: u8, chain: &[Work<'_>]) -> bool {
        match self.end.endpoint.post(self.link, lane, chain) {
            Ok(()) => true,
            Err(PostError::WouldBlock) => false,
            Err(error) => panic!("post: {error}"),
        }
    }

    /// Compares what has arrived with what was sent.
    fn receive(&mut self, lane: u8, slot: usize) {
        let note = self.expected.lane(lane, VecDeque::pop_front).expect("it was sent");
        assert_eq!(slot, note.slot, "lane {lane} brings another transfer than {note:?}");
        // SAFETY: the slot is this side's until it is given back.
        let bytes = unsafe { self.landing.bytes(note.start..note.start + note.len) }.expect("in bounds");
        assert_eq!(crc32c::crc32c(bytes), note.checksum, "{note:?} on lane {lane} is damaged");
        self.to_give_back.push_back(slot);
        self.to_receive -= 1;
    }
}
