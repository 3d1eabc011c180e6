//! The endpoint: its links, and what the caller asks of them.

use super::MAX_LANES;
use super::dial::Dial;
use super::doorbell::OwnDoorbell;
use super::link::{Link, State};
use super::post::Unposted;
use super::rendezvous::Candidate;
use super::ring::CAPACITY;
use super::rings::{Farewell, other};
use super::socket::{Listener, random};
use super::watch::{Source, Watch};
use super::wire::{GrantDescriptor, LinkDescriptor};
use crate::{
    Access, Completion, Descriptor, DeviceOptions, Disconnect, Endpoint, LinkId, LinkSpec, Placement, PostError,
    Provider, Region, RemoteRegion, Side, TransportError, Waker, Work,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An endpoint of the provider. Apart from what other threads write: every poll counts in it.
#[repr(align(128))]
pub(super) struct ShmEndpoint {
    pub(super) options: DeviceOptions,
    /// Which boot of which host this is.
    host: [u8; 16],
    pub(super) bell: Arc<OwnDoorbell>,
    pub(super) watch: Watch,
    /// From the first passive link on.
    pub(super) listener: Option<Listener>,
    /// The listener is muted for want of resources.
    pub(super) deaf: bool,
    /// Oldest first.
    pub(super) candidates: Vec<Candidate>,
    pub(super) next_candidate: u32,
    /// By ascending id.
    pub(super) links: Vec<Link>,
    next_link: u32,
    /// What happened and was not yet reported.
    pub(super) ready: VecDeque<Completion>,
    /// Which link is looked at first by the next poll.
    pub(super) first: usize,
    /// When the sockets are looked at.
    pub(super) schedule: super::progress::Schedule,
}

impl ShmEndpoint {
    pub(super) fn new(options: DeviceOptions) -> Result<Self, TransportError> {
        Ok(Self {
            options,
            host: host()?,
            bell: Arc::new(OwnDoorbell::create()?),
            watch: Watch::new()?,
            listener: None,
            deaf: false,
            candidates: Vec::new(),
            next_candidate: 0,
            links: Vec::new(),
            next_link: 0,
            ready: VecDeque::with_capacity(CAPACITY),
            first: 0,
            schedule: Default::default(),
        })
    }

    pub(super) fn position(&self, id: LinkId) -> Option<usize> {
        self.links.binary_search_by_key(&id, |link| link.id).ok()
    }

    pub(super) fn link(&mut self, id: LinkId) -> Option<&mut Link> {
        let index = self.position(id)?;
        self.links.get_mut(index)
    }

    /// The connection of a link that works.
    fn connection(&mut self, id: LinkId) -> Result<&mut super::connection::Connection, TransportError> {
        let connection = self.link(id).and_then(Link::connection).filter(|connection| connection.is_open());
        connection.ok_or(TransportError::NoLink(id))
    }

    /// Ends a link that this side has found fault with, or that did not come to be.
    #[cold]
    pub(super) fn fail(&mut self, index: usize, reason: Disconnect) {
        let link = &mut self.links[index];
        match std::mem::replace(&mut link.state, State::Ended) {
            State::Connected(connection) => connection.leave(match reason {
                Disconnect::AccessRefused(_) => Farewell::AccessRefused,
                Disconnect::Protocol(_) => Farewell::Protocol,
                _ => Farewell::Closed,
            }),
            State::Dialling(dial) => dial.leave(),
            State::Opened(_) | State::Awaiting(_) | State::Ended => {}
        }
        self.ready.push_back(Completion::Disconnected { link: link.id, reason });
    }
}

impl Endpoint for ShmEndpoint {
    fn open(&mut self, spec: LinkSpec) -> Result<(LinkId, Descriptor), TransportError> {
        if spec.lanes == 0 || spec.lanes > MAX_LANES {
            return Err(TransportError::invalid(format!("{} lanes: a link has 1 to {MAX_LANES}", spec.lanes)));
        }
        let mut token = [0; 8];
        random(&mut token)?;
        let token = u64::from_le_bytes(token);
        let socket = match (spec.side, &self.listener) {
            (Side::Active, _) => [0; 16],
            (Side::Passive, Some(listener)) => listener.name(),
            (Side::Passive, None) => {
                let listener = Listener::bind()?;
                self.watch.add(&listener, Source::Listener)?;
                self.listener.insert(listener).name()
            }
        };
        let id = LinkId(self.next_link);
        self.next_link =
            id.0.checked_add(1).ok_or_else(|| TransportError::invalid("an endpoint makes 4 billion links"))?;
        self.links.push(Link { id, spec, token, state: State::Opened(None), refusal: None });
        let descriptor = LinkDescriptor { side: spec.side, host: self.host, pid: std::process::id(), socket, token };
        Ok((id, descriptor.encode()))
    }

    fn connect(&mut self, link: LinkId, peer: &[u8], timeout: Duration) -> Result<(), TransportError> {
        let index = self.position(link).ok_or(TransportError::NoLink(link))?;
        let peer = LinkDescriptor::decode(peer)?;
        let entry = &mut self.links[index];
        let State::Opened(arrived) = &mut entry.state else {
            return Err(TransportError::invalid(format!("{link:?} is connected, or was")));
        };
        if peer.side != other(entry.spec.side) {
            let what = format!("both ends of the link are {:?}", peer.side);
            return Err(TransportError::Descriptor { provider: Provider::Shm, what });
        }
        if peer.host != self.host {
            return Err(TransportError::Unsupported {
                what: format!("shm with process {} of another host", peer.pid),
                hint: "use tcp between hosts".into(),
            });
        }
        let deadline = Instant::now().checked_add(timeout);
        match (entry.spec.side, arrived.take()) {
            (Side::Passive, Some(connection)) => self.welcome(index, connection),
            (Side::Passive, None) => entry.state = State::Awaiting(deadline),
            (Side::Active, _) => entry.state = State::Dialling(Box::new(Dial::new(peer, deadline)?)),
        }
        self.schedule.hurry();
        Ok(())
    }

    fn grant(&mut self, link: LinkId, region: &Region, access: Access) -> Result<Descriptor, TransportError> {
        Ok(self.connection(link)?.grant(region, access)?.encode())
    }

    fn import(
        &mut self,
        link: LinkId,
        descriptor: &[u8],
        placement: Option<Placement>,
    ) -> Result<RemoteRegion, TransportError> {
        let grant = GrantDescriptor::decode(descriptor)?;
        self.connection(link)?.import(link, grant, placement)
    }

    fn close(&mut self, link: LinkId) {
        let Some(index) = self.position(link) else { return };
        match self.links.remove(index).state {
            State::Connected(connection) => connection.leave(Farewell::Closed),
            State::Dialling(dial) => dial.leave(),
            State::Opened(_) | State::Awaiting(_) | State::Ended => {}
        }
        self.ready.retain(|completion| {
            let (Completion::Connected { link: of }
            | Completion::Sent { link: of, .. }
            | Completion::Immediate { link: of, .. }
            | Completion::Disconnected { link: of, .. }) = completion;
            *of != link
        });
    }

    fn post(&mut self, link: LinkId, lane: u8, chain: &[Work<'_>]) -> Result<(), PostError> {
        let not_connected = PostError::NotConnected(link);
        let Some(index) = self.position(link) else { return Err(not_connected) };
        let connection = match &mut self.links[index].state {
            State::Connected(connection) => connection,
            _ => return Err(not_connected),
        };
        match connection.post(link, lane, chain, &mut self.ready) {
            Ok(()) => Ok(()),
            Err(Unposted::Error(error)) => Err(error),
            Err(Unposted::Nonsense) => {
                self.fail(index, Disconnect::Protocol("the peer wrote nonsense into a ring".into()));
                Err(not_connected)
            }
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError> {
        self.make_progress(completions)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), TransportError> {
        self.sleep(timeout)
    }

    fn waker(&self) -> Waker {
        Waker(self.bell.clone())
    }
}

impl Drop for ShmEndpoint {
    fn drop(&mut self) {
        for id in self.links.iter().map(|link| link.id).collect::<Vec<_>>() {
            self.close(id);
        }
    }
}

/// The running boot of this host: two processes with the same one can share memory.
fn host() -> Result<[u8; 16], TransportError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text =
        std::fs::read_to_string(path).map_err(|error| TransportError::system(format!("reading {path}"), error))?;
    let digits: Vec<u8> =
        text.bytes().filter_map(|byte| char::from(byte).to_digit(16)).map(|digit| digit as u8).collect();
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
        *byte = pair.iter().fold(0, |byte, digit| byte << 4 | digit);
    }
    Ok(id)
}
