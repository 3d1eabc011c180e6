//! A wire that takes its time: what one end posts, the other end is told of so much later, whenever it looks.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use stepmesh_transport::{
    Access, Completion, Descriptor, Device, Endpoint, LinkId, LinkSpec, Op, Placement, PostError, Properties, Region,
    RemoteRegion, TransportError, Waker, Work,
};

/// One direction between two ends with one link of one lane: when each immediate was posted, in order.
#[derive(Default)]
struct Way {
    posted: Mutex<VecDeque<Instant>>,
    latency_ns: AtomicU64,
}

impl Way {
    fn with<T>(&self, change: impl FnOnce(&mut VecDeque<Instant>) -> T) -> T {
        change(&mut self.posted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Both directions.
#[derive(Clone, Default)]
pub(super) struct Wire([Arc<Way>; 2]);

impl Wire {
    /// From now on both directions together take `round`.
    pub(super) fn set(&self, round: Duration) {
        self.0.iter().for_each(|way| way.latency_ns.store((round / 2).as_nanos() as u64, Ordering::Relaxed));
    }

    /// A device at one of the two ends.
    pub(super) fn between(&self, device: Arc<dyn Device>, end: usize) -> Arc<dyn Device> {
        Arc::new(WiredDevice { inner: device, out: self.0[end].clone(), into: self.0[1 - end].clone() })
    }
}

struct WiredDevice {
    inner: Arc<dyn Device>,
    out: Arc<Way>,
    into: Arc<Way>,
}

impl Device for WiredDevice {
    fn properties(&self) -> Properties {
        self.inner.properties()
    }

    fn allocate(&self, len: usize, access: Access, placement: Option<Placement>) -> Result<Region, TransportError> {
        self.inner.allocate(len, access, placement)
    }

    fn endpoint(&self) -> Result<Box<dyn Endpoint>, TransportError> {
        Ok(Box::new(WiredEndpoint {
            inner: self.inner.endpoint()?,
            out: self.out.clone(),
            into: self.into.clone(),
            seen: Vec::with_capacity(64),
            on_its_way: VecDeque::with_capacity(64),
        }))
    }
}

struct WiredEndpoint {
    inner: Box<dyn Endpoint>,
    out: Arc<Way>,
    into: Arc<Way>,
    seen: Vec<Completion>,
    /// What is here but not yet to be seen.
    on_its_way: VecDeque<(Instant, Completion)>,
}

impl Endpoint for WiredEndpoint {
    fn open(&mut self, spec: LinkSpec) -> Result<(LinkId, Descriptor), TransportError> {
        self.inner.open(spec)
    }

    fn connect(&mut self, link: LinkId, peer: &[u8], timeout: Duration) -> Result<(), TransportError> {
        self.inner.connect(link, peer, timeout)
    }

    fn grant(&mut self, link: LinkId, region: &Region, access: Access) -> Result<Descriptor, TransportError> {
        self.inner.grant(link, region, access)
    }

    fn import(
        &mut self,
        link: LinkId,
        descriptor: &[u8],
        placement: Option<Placement>,
    ) -> Result<RemoteRegion, TransportError> {
        self.inner.import(link, descriptor, placement)
    }

    fn close(&mut self, link: LinkId) {
        self.inner.close(link);
    }

    fn post(&mut self, link: LinkId, lane: u8, chain: &[Work<'_>]) -> Result<(), PostError> {
        let immediates = chain.iter().filter(|work| matches!(work.op, Op::WriteImmediate { .. })).count();
        // Before it is posted, for the peer may be quick.
        let now = Instant::now();
        self.out.with(|posted| posted.extend(std::iter::repeat_n(now, immediates)));
        self.inner.post(link, lane, chain).inspect_err(|_| {
            self.out.with(|posted| posted.truncate(posted.len() - immediates));
        })
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError> {
        let before = completions.len();
        self.inner.poll(&mut self.seen)?;
        let latency = Duration::from_nanos(self.into.latency_ns.load(Ordering::Relaxed));
        for completion in self.seen.drain(..) {
            let due = match completion {
                Completion::Immediate { .. } => {
                    self.into.with(VecDeque::pop_front).map_or_else(Instant::now, |posted| posted + latency)
                }
                _ => Instant::now(),
            };
            self.on_its_way.push_back((due, completion));
        }
        while let Some((due, _)) = self.on_its_way.front()
            && *due <= Instant::now()
            && let Some((_, completion)) = self.on_its_way.pop_front()
        {
            completions.push(completion);
        }
        Ok(completions.len() - before)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), TransportError> {
        let due = self.on_its_way.front().map(|(due, _)| due.saturating_duration_since(Instant::now()));
        self.inner.wait(due.map_or(timeout, |due| due.min(timeout)))
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}
