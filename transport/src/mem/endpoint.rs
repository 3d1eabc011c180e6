//! The device and the endpoint: checks what is asked for, and hands it to the network.

use super::Fabric;
use super::delivery::{Body, Bytes, Place, Request, Stretch};
use super::descriptor::{self, RegionDescriptor};
use super::link::{Grant, Half, HalfId, State};
use super::memory::SharedMemory;
use super::network::{Event, Network};
use crate::memory::Registered;
use crate::{
    Access, Completion, Descriptor, Device, Endpoint, LinkId, LinkSpec, Memory, Op, Placement, PostError, Properties,
    Provider, Region, RemoteRegion, Source, TransportError, Wake, Waker, Work,
};
use std::sync::Arc;
use std::time::Duration;

const MAX_LANES: u8 = 8;
const MAX_INLINE: usize = 256;
/// Completions that one poll returns at most.
const POLL_BATCH: usize = 256;
const NO_FETCH_ADD: PostError = PostError::Unsupported { provider: Provider::Mem, what: "fetch-add" };

/// A name on a fabric.
pub(super) struct MemDevice {
    pub(super) fabric: Fabric,
    pub(super) name: Arc<str>,
}

impl Device for MemDevice {
    fn properties(&self) -> Properties {
        let network = self.fabric.network();
        Properties {
            provider: Provider::Mem,
            maps_peer_memory: network.options.maps_peer_memory,
            max_lanes: MAX_LANES,
            max_inline: MAX_INLINE,
            queue_depth: network.options.queue_depth,
            fetch_add: false,
            rails: 1,
        }
    }

    fn allocate(&self, len: usize, access: Access, placement: Option<Placement>) -> Result<Region, TransportError> {
        Ok(Region::new(Arc::new(SharedMemory::allocate(len, access, placement)?)))
    }

    fn register(&self, memory: Arc<dyn Memory>, access: Access) -> Result<Region, TransportError> {
        if access == Access::Local || !self.properties().maps_peer_memory {
            return Registered::adopt(memory, access);
        }
        Err(TransportError::Unsupported {
            what: format!(
                "registering {} bytes of the caller's for {access:?} on a fabric that maps them",
                memory.len()
            ),
            hint: "allocate the region on the device".into(),
        })
    }

    fn endpoint(&self) -> Result<Box<dyn Endpoint>, TransportError> {
        let station = self.fabric.network().add_station(self.name.clone());
        Ok(Box::new(MemEndpoint { fabric: self.fabric.clone(), station }))
    }
}

/// A station's number; all its state is the network's.
struct MemEndpoint {
    fabric: Fabric,
    station: u32,
}

impl MemEndpoint {
    fn id(&self, link: LinkId) -> HalfId {
        HalfId { endpoint: self.station, link }
    }
}

/// A half that is connected.
fn connected(network: &mut Network, id: HalfId) -> Result<&mut Half, TransportError> {
    network.half(id).filter(|half| half.state == State::Connected).ok_or(TransportError::NoLink(id.link))
}

impl Endpoint for MemEndpoint {
    fn open(&mut self, spec: LinkSpec) -> Result<(LinkId, Descriptor), TransportError> {
        if spec.lanes == 0 || spec.lanes > MAX_LANES {
            return Err(TransportError::invalid(format!("{} lanes: a link has 1 to {MAX_LANES}", spec.lanes)));
        }
        let mut network = self.fabric.network();
        let (now, range) = (network.clock.now(), network.options.lane_skew.clone());
        let skews: Vec<_> = (0..spec.lanes).map(|_| network.draw(range.clone())).collect();
        let fabric = network.id;
        let station = network.stations.get_mut(self.station).filter(|station| station.alive);
        let station = station.ok_or_else(|| TransportError::invalid("the device was killed: make a new endpoint"))?;
        let link = LinkId(station.halves.add(Half::new(spec, skews.into_iter(), now)));
        Ok((link, descriptor::encode_half(fabric, self.id(link))))
    }

    fn connect(&mut self, link: LinkId, peer: &[u8], timeout: Duration) -> Result<(), TransportError> {
        let (id, mut network) = (self.id(link), self.fabric.network());
        let (now, fabric) = (network.clock.now(), network.id);
        let half = network.half(id).filter(|half| half.state == State::Open).ok_or(TransportError::NoLink(link))?;
        if half.peer.is_some() {
            return Err(TransportError::invalid(format!("link {link:?} is being connected already")));
        }
        let peer = descriptor::decode_half(fabric, peer)?;
        half.peer = Some(peer);
        let hello = Body::Hello(half.spec);
        let deadline = network.schedule(now + timeout, Event::Deadline(id));
        if let Some(half) = network.half(id) {
            half.deadline = Some(deadline);
        }
        network.greet(now, id, peer, hello);
        network.connect_if_ready(id);
        Ok(())
    }

    fn grant(&mut self, link: LinkId, region: &Region, access: Access) -> Result<Descriptor, TransportError> {
        let (id, mut network) = (self.id(link), self.fabric.network());
        connected(&mut network, id)?;
        let shared = region.memory().as_any().downcast_ref::<SharedMemory>().map(SharedMemory::access);
        let allowed = shared.or_else(|| Registered::access(region));
        let allowed = allowed.ok_or_else(|| TransportError::invalid("the region is not of a `mem` device"))?;
        if access == Access::Local || access > allowed {
            return Err(TransportError::invalid(format!("granting {access:?} of a region allocated for {allowed:?}")));
        }
        let key = network.draw_key();
        connected(&mut network, id)?.grants.insert(key, Grant { region: region.clone(), access });
        let granted = RegionDescriptor { granter: id, key, len: region.len() as u64, access };
        Ok(descriptor::encode_region(network.id, granted))
    }

    fn import(
        &mut self,
        link: LinkId,
        descriptor: &[u8],
        placement: Option<Placement>,
    ) -> Result<RemoteRegion, TransportError> {
        let (id, mut network) = (self.id(link), self.fabric.network());
        let peer = connected(&mut network, id)?.peer;
        let RegionDescriptor { granter, key, len, access } = descriptor::decode_region(network.id, descriptor)?;
        if peer != Some(granter) {
            return Err(descriptor::refused("it was granted over another link"));
        }
        let mut mapped = None;
        if network.options.maps_peer_memory {
            let grant = network.half(granter).and_then(|half| half.grants.get(&key));
            let memory = grant.map(|grant| grant.region.memory().clone());
            let memory = memory.as_ref().and_then(|memory| memory.as_any().downcast_ref::<SharedMemory>());
            let memory = memory.ok_or_else(|| descriptor::refused("its region is no longer granted"))?;
            mapped = Some(Region::new(Arc::new(memory.map_again(access == Access::PeerWrite, placement)?)));
        }
        Ok(RemoteRegion { link, key, len, access, mapped })
    }

    fn close(&mut self, link: LinkId) {
        let id = self.id(link);
        self.fabric.network().close(id);
    }

    fn post(&mut self, link: LinkId, lane: u8, chain: &[Work<'_>]) -> Result<(), PostError> {
        let (id, mut network) = (self.id(link), self.fabric.network());
        let (now, depth) = (network.clock.now(), network.options.queue_depth);
        let half = network.half(id).filter(|half| half.state == State::Connected);
        let lanes = &mut half.ok_or(PostError::NotConnected(link))?.lanes;
        let count = lanes.len();
        let state = lanes.get_mut(usize::from(lane));
        let state = state.ok_or_else(|| PostError::Invalid(format!("lane {lane} of a link of {count}")))?;
        if chain.len() > depth {
            return Err(PostError::Invalid(format!("a chain of {} on a lane that holds {depth}", chain.len())));
        }
        chain.iter().try_for_each(|work| check(&work.op))?;
        if state.outstanding.len() + chain.len() > depth {
            return Err(PostError::WouldBlock);
        }
        state.outstanding.extend(chain.iter().map(|work| work.signal));
        for work in chain {
            let (work, bytes) = request(&work.op)?;
            network.send_work(now, id, lane, bytes, Body::Work { lane, work });
        }
        Ok(())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError> {
        let mut network = self.fabric.network();
        network.run();
        let Some(station) = network.stations.get_mut(self.station) else { return Ok(0) };
        let count = station.completed.len().min(POLL_BATCH);
        completions.extend(station.completed.drain(..count));
        Ok(count)
    }

    /// Returns at once: on a virtual clock nothing happens while a thread sleeps.
    fn wait(&mut self, _timeout: Duration) -> Result<(), TransportError> {
        Ok(())
    }

    fn waker(&self) -> Waker {
        Waker(Arc::new(Awake))
    }
}

impl Drop for MemEndpoint {
    fn drop(&mut self) {
        let mut network = self.fabric.network();
        let links =
            network.stations.get(self.station).map(|station| station.halves.iter().map(|(link, _)| link).collect());
        for link in Option::<Vec<_>>::unwrap_or_default(links) {
            network.close(self.id(LinkId(link)));
        }
        network.stations.remove(self.station);
    }
}

/// Nobody sleeps, so nobody is woken.
struct Awake;

impl Wake for Awake {
    fn wake(&self) {}
}

/// What of an operation this side can judge.
fn check(op: &Op<'_>) -> Result<(), PostError> {
    let local = |region: &Region, offset: usize, len: usize| region.check_local(Provider::Mem, offset, len);
    let source = |source: &Source<'_>| match *source {
        Source::Inline(bytes) if bytes.len() > MAX_INLINE => {
            Err(PostError::Invalid(format!("{} inline bytes: at most {MAX_INLINE}", bytes.len())))
        }
        Source::Inline(_) => Ok(()),
        Source::Region(region, offset, len) => local(region, offset, len),
    };
    match op {
        Op::Write { source: from, .. } => source(from),
        Op::WriteImmediate { source: from, remote: None, .. } if !from.is_empty() => {
            Err(PostError::Invalid(format!("{} bytes without a place to write them to", from.len())))
        }
        Op::WriteImmediate { source: from, .. } => source(from),
        Op::Read { target, .. } if !target.region.writable() => {
            Err(PostError::Invalid("the target of a read is mapped read-only".into()))
        }
        Op::Read { target, .. } => local(target.region, target.offset, target.len),
        Op::FetchAdd { .. } => Err(NO_FETCH_ADD),
    }
}

/// A checked operation as a message, and the bytes that it carries.
fn request(op: &Op<'_>) -> Result<(Request, usize), PostError> {
    let place = |remote: &crate::Remote<'_>| Place { key: remote.region.key, offset: remote.offset };
    let bytes = |source: &Source<'_>| match *source {
        Source::Inline(bytes) => Bytes::Inline(bytes.to_vec()),
        Source::Region(region, offset, len) => Bytes::Region(Stretch { region: region.clone(), offset, len }),
    };
    Ok(match op {
        Op::Write { source, remote } => {
            let request = Request::Write { source: bytes(source), place: Some(place(remote)), immediate: None };
            (request, source.len())
        }
        Op::WriteImmediate { source, remote, immediate } => {
            let (place, immediate) = (remote.as_ref().map(place), Some(*immediate));
            (Request::Write { source: bytes(source), place, immediate }, source.len())
        }
        Op::Read { remote, target } => {
            let target = Stretch { region: target.region.clone(), offset: target.offset, len: target.len };
            (Request::Read { place: place(remote), target }, 0)
        }
        Op::FetchAdd { .. } => return Err(NO_FETCH_ADD),
    })
}
