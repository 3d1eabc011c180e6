//! A wire that takes its time: what one end posts, the other end is told of so much later, whenever it looks.

use super::board::{Board, Way};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use stepmesh_transport::{
    Access, Clock, Completion, Descriptor, Device, Endpoint, LinkId, LinkSpec, Op, Placement, PostError, Properties,
    Region, RemoteRegion, TransportError, Waker, Work,
};

/// Both directions.
#[derive(Clone)]
pub(super) struct Wire(Board);

impl Wire {
    pub(super) fn new(board: Board) -> Self {
        Self(board)
    }

    /// From now on both directions together take `round`.
    pub(super) fn set(&self, round: Duration) {
        self.0.ways.iter().for_each(|way| way.latency_ns.store((round / 2).as_nanos() as u64, Ordering::Relaxed));
    }

    /// A device at one of the two ends, which goes by a clock of its own.
    pub(super) fn between(&self, device: Arc<dyn Device>, end: usize, clock: Clock) -> Arc<dyn Device> {
        Arc::new(WiredDevice { inner: device, board: self.0.clone(), end, clock })
    }

    /// When the first arrives of what an end has not seen, if anything is on its way.
    pub(super) fn next_arrival_ns(&self, end: usize) -> Option<u64> {
        let way = &self.0.ways[1 - end];
        Some(way.oldest_ns()? + way.latency_ns.load(Ordering::Relaxed))
    }
}

struct WiredDevice {
    inner: Arc<dyn Device>,
    board: Board,
    end: usize,
    clock: Clock,
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
            board: self.board.clone(),
            end: self.end,
            clock: self.clock.clone(),
            seen: Vec::with_capacity(64),
            here: VecDeque::with_capacity(64),
        }))
    }
}

struct WiredEndpoint {
    inner: Box<dyn Endpoint>,
    board: Board,
    end: usize,
    clock: Clock,
    seen: Vec<Completion>,
    /// What is here but not yet to be seen.
    here: VecDeque<Completion>,
}

impl WiredEndpoint {
    fn outgoing(&self) -> &Way {
        &self.board.ways[self.end]
    }

    fn incoming(&self) -> &Way {
        &self.board.ways[1 - self.end]
    }

    /// When the oldest of what is here may be seen: an immediate when it has been under way for long enough, anything else
    /// at once.
    fn due_ns(&self) -> Option<u64> {
        match self.here.front()? {
            Completion::Immediate { .. } => {
                let posted_ns = self.incoming().oldest_ns().unwrap_or_default();
                Some(posted_ns + self.incoming().latency_ns.load(Ordering::Relaxed))
            }
            _ => Some(0),
        }
    }
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
        if !self.outgoing().post(immediates, self.clock.now_ns()) {
            return Err(PostError::WouldBlock);
        }
        let posted = self.inner.post(link, lane, chain);
        if posted.is_err() {
            self.outgoing().take_back(immediates);
        }
        posted
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError> {
        let before = completions.len();
        self.inner.poll(&mut self.seen)?;
        self.here.extend(self.seen.drain(..));
        while self.due_ns().is_some_and(|due_ns| due_ns <= self.clock.now_ns())
            && let Some(completion) = self.here.pop_front()
        {
            if matches!(completion, Completion::Immediate { .. }) {
                self.incoming().take();
            }
            completions.push(completion);
        }
        Ok(completions.len() - before)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), TransportError> {
        let due = self.due_ns().map(|due_ns| Duration::from_nanos(due_ns.saturating_sub(self.clock.now_ns())));
        self.inner.wait(due.map_or(timeout, |due| due.min(timeout)))
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}
