//! The stage of the suite: ends that are polled in turn on one thread, until something has happened.

use super::Fixture;
use crate::{
    Access, Completion, Descriptor, Device, Disconnect, Endpoint, LinkId, LinkSecret, LinkSpec, Op, PostError, Region,
    Remote, RemoteRegion, Side, Source, Work, WorkError,
};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The first end, which dials.
pub const A: usize = 0;
/// The second end, which is dialled.
pub const B: usize = 1;

/// How long anything may take that should happen.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// What `connect` is given when it should succeed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// One endpoint, alone on its device, and all that it has seen.
pub struct End {
    /// Its device.
    pub device: Arc<dyn Device>,
    /// Itself.
    pub endpoint: Box<dyn Endpoint>,
    /// Every completion so far, in order.
    pub seen: Vec<Completion>,
}

impl End {
    /// The (lane, immediate) pairs that have come over a link, in order.
    pub fn immediates(&self, of: LinkId) -> Vec<(u8, u32)> {
        let immediate = |completion: &Completion| match *completion {
            Completion::Immediate { link, lane, immediate } if link == of => Some((lane, immediate)),
            _ => None,
        };
        self.seen.iter().filter_map(immediate).collect()
    }

    /// The (token, result) pairs of a link's work, in order.
    pub fn sent(&self, of: LinkId) -> Vec<(u64, Result<(), WorkError>)> {
        let sent = |completion: &Completion| match *completion {
            Completion::Sent { link, token, result, .. } if link == of => Some((token, result)),
            _ => None,
        };
        self.seen.iter().filter_map(sent).collect()
    }

    /// How often `Connected` has come for a link.
    pub fn connected(&self, of: LinkId) -> usize {
        self.seen.iter().filter(|seen| matches!(seen, Completion::Connected { link } if *link == of)).count()
    }

    /// Why a link has ended, if it has.
    pub fn ended(&self, of: LinkId) -> Option<&Disconnect> {
        self.seen.iter().find_map(|seen| match seen {
            Completion::Disconnected { link, reason } if *link == of => Some(reason),
            _ => None,
        })
    }

    /// Polls once; whether anything came.
    pub fn poll(&mut self) -> bool {
        self.endpoint.poll(&mut self.seen).expect("poll") > 0
    }

    /// Allocates a region of this end's device that holds `pattern(seed, len)`.
    pub fn source(&self, seed: u64, len: usize) -> Region {
        let region = self.device.allocate(len, Access::Local, None).expect("allocate");
        region.write(0, &pattern(seed, len)).expect("fill");
        region
    }
}

/// A connected link between the ends [`A`] and [`B`]: its name at each.
#[derive(Clone, Copy, Debug)]
pub struct Link(pub [LinkId; 2]);

/// A region that one end has granted and the other has imported.
#[derive(Clone, Debug)]
pub struct Granted {
    /// At the granter.
    pub region: Region,
    /// At the peer.
    pub remote: RemoteRegion,
}

impl Granted {
    /// Copies a range of the region out, at the granter.
    pub fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        let mut out = vec![0; range.len()];
        self.region.read(range.start, &mut out).expect("in bounds");
        out
    }
}

/// Two ends and the fixture that made them.
pub struct World<'f> {
    /// The provider.
    pub fixture: &'f mut dyn Fixture,
    /// The ends, [`A`] and [`B`].
    pub ends: [End; 2],
}

impl<'f> World<'f> {
    /// Opens two devices with an endpoint each.
    pub fn new(fixture: &'f mut dyn Fixture) -> Self {
        let ends = [A, B].map(|_| {
            let device = fixture.device();
            let endpoint = device.endpoint().expect("endpoint");
            End { device, endpoint, seen: Vec::new() }
        });
        Self { fixture, ends }
    }

    /// Opens two devices and connects them with `lanes` lanes.
    pub fn connected(fixture: &'f mut dyn Fixture, lanes: u8) -> (Self, Link) {
        let mut world = Self::new(fixture);
        let link = world.link(lanes);
        (world, link)
    }

    /// Polls both ends; lets time pass if neither saw anything.
    pub fn pump(&mut self) {
        let progress = self.ends.each_mut().map(End::poll);
        if !progress.contains(&true) {
            self.fixture.pass();
        }
    }

    /// Pumps until `done`; fails loudly, naming `what`, when that takes too long.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut [End; 2]) -> bool) {
        let clock = self.fixture.clock();
        let deadline = clock.now() + PATIENCE;
        while !done(&mut self.ends) {
            let latest = |end: &End| end.seen[end.seen.len().saturating_sub(8)..].to_vec();
            assert!(
                clock.now() < deadline,
                "waited in vain until {what}; the ends saw last: A {:?}, B {:?}",
                latest(&self.ends[A]),
                latest(&self.ends[B])
            );
            self.pump();
        }
    }

    /// Pumps for a while in which nothing is expected.
    pub fn linger(&mut self, time: Duration) {
        let clock = self.fixture.clock();
        let end = clock.now() + time;
        while clock.now() < end {
            self.pump();
        }
    }

    /// Opens both halves of a link, each with its own spec, and connects them to each other's descriptor.
    pub fn dial(&mut self, specs: [LinkSpec; 2], timeout: Duration) -> Link {
        let (a, of_a) = self.ends[A].endpoint.open(specs[A]).expect("open");
        let (b, of_b) = self.ends[B].endpoint.open(specs[B]).expect("open");
        self.ends[B].endpoint.connect(b, &of_a, timeout).expect("connect");
        self.ends[A].endpoint.connect(a, &of_b, timeout).expect("connect");
        Link([a, b])
    }

    /// Connects the ends with one more link.
    pub fn link(&mut self, lanes: u8) -> Link {
        let spec = spec(lanes, Side::Active);
        let link = self.dial([spec, LinkSpec { side: Side::Passive, ..spec }], CONNECT_TIMEOUT);
        self.until("the link is connected", |ends| ends.iter().zip(link.0).all(|(end, id)| end.connected(id) > 0));
        link
    }

    /// Allocates `len` bytes at `granter`, grants them over the link and imports them at the other end.
    pub fn grant(&mut self, link: Link, granter: usize, len: usize, access: Access) -> Granted {
        let region = self.ends[granter].device.allocate(len, access, None).expect("allocate");
        self.grant_region(link, granter, region, access)
    }

    /// Grants a region over the link and imports it at the other end.
    pub fn grant_region(&mut self, link: Link, granter: usize, region: Region, access: Access) -> Granted {
        let descriptor = self.describe(link, granter, &region, access);
        let peer = 1 - granter;
        let remote = self.ends[peer].endpoint.import(link.0[peer], &descriptor, None).expect("import");
        Granted { region, remote }
    }

    /// Grants a region over the link.
    pub fn describe(&mut self, link: Link, granter: usize, region: &Region, access: Access) -> Descriptor {
        self.ends[granter].endpoint.grant(link.0[granter], region, access).expect("grant")
    }

    /// Posts one operation, pumping while the lane is full.
    pub fn post(&mut self, end: usize, link: Link, lane: u8, op: Op<'_>, signal: Option<u64>) {
        let chain = [Work { op, signal }];
        loop {
            match self.ends[end].endpoint.post(link.0[end], lane, &chain) {
                Ok(()) => return,
                Err(PostError::WouldBlock) => self.pump(),
                Err(error) => panic!("post: {error}"),
            }
        }
    }

    /// Posts one signalled operation and pumps until it is done.
    pub fn perform(&mut self, end: usize, link: Link, op: Op<'_>) {
        let earlier = self.ends[end].sent(link.0[end]).len();
        self.post(end, link, 0, op, Some(earlier as u64));
        self.until("the work is done", |ends| ends[end].sent(link.0[end]).len() > earlier);
        assert_eq!(self.ends[end].sent(link.0[end])[earlier], (earlier as u64, Ok(())));
    }

    /// Sends an immediate on each of `lanes` lanes and pumps until all have arrived: what was posted before is there.
    pub fn flush(&mut self, from: usize, link: Link, lanes: u8) {
        let to = 1 - from;
        let before = self.ends[to].immediates(link.0[to]).len();
        for lane in 0..lanes {
            self.post(from, link, lane, notify(u32::MAX), None);
        }
        let all = before + usize::from(lanes);
        self.until("all lanes have reported", |ends| {
            ends[to].immediates(link.0[to])[before..].iter().filter(|(_, immediate)| *immediate == u32::MAX).count()
                >= usize::from(lanes)
        });
        assert!(self.ends[to].immediates(link.0[to]).len() >= all);
    }

    /// Pumps until both ends know that the link has ended, and returns why, as each tells it.
    pub fn both_ended(&mut self, link: Link) -> [Disconnect; 2] {
        self.until("both ends see the link end", |ends| {
            ends.iter().zip(link.0).all(|(end, id)| end.ended(id).is_some())
        });
        [A, B].map(|end| self.ends[end].ended(link.0[end]).cloned().expect("just seen"))
    }

    /// Checks that a link still carries bytes, both ways.
    pub fn assert_alive(&mut self, link: Link) {
        for from in [A, B] {
            let target = self.grant(link, 1 - from, 100, Access::PeerWrite);
            let source = self.ends[from].source(from as u64, 100);
            self.perform(from, link, write(&source, 0..100, &target.remote, 0));
            self.flush(from, link, 1);
            assert_eq!(target.bytes(0..100), pattern(from as u64, 100));
        }
    }
}

/// A fresh spec: a new incarnation and a random secret.
pub fn spec(lanes: u8, side: Side) -> LinkSpec {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let mut secret = [0; 16];
    getrandom::fill(&mut secret).expect("random bytes");
    LinkSpec { incarnation: NEXT.fetch_add(1, Ordering::Relaxed), secret: LinkSecret(secret), lanes, side }
}

/// Bytes that differ from place to place and from seed to seed, none of them zero.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 56) % 255) as u8 + 1
    };
    (0..len).map(|_| next()).collect()
}

/// A write of a range of a region.
pub fn write<'a>(source: &'a Region, range: Range<usize>, to: &'a RemoteRegion, offset: u64) -> Op<'a> {
    Op::Write { source: Source::region(source, range), remote: Remote { region: to, offset } }
}

/// A write of a range of a region, with an immediate.
pub fn write_immediate<'a>(
    source: &'a Region,
    range: Range<usize>,
    to: &'a RemoteRegion,
    offset: u64,
    immediate: u32,
) -> Op<'a> {
    let remote = Some(Remote { region: to, offset });
    Op::WriteImmediate { source: Source::region(source, range), remote, immediate }
}

/// An immediate without bytes.
pub fn notify(immediate: u32) -> Op<'static> {
    Op::WriteImmediate { source: Source::Inline(&[]), remote: None, immediate }
}

/// An operation without a signal, as part of a chain.
pub fn work(op: Op<'_>) -> Work<'_> {
    Work { op, signal: None }
}
