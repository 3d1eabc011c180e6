//! The endpoint: what its owner asks for. What the network brings is in `progress`.

use super::MAX_LANES;
use super::descriptor::{Granted, LinkHalf};
use super::frame::{Header, Opcode};
use super::greeting::{Dial, Greeting};
use super::linger::Linger;
use super::link::{Link, Phase, Seat};
use super::lively::Lively;
use super::memory::may_grant;
use super::poller::{Poller, Token};
use super::socket;
use crate::{
    Access, Completion, Descriptor, DeviceOptions, Disconnect, Endpoint, LinkId, LinkSpec, Placement, PostError,
    Provider, Region, RemoteRegion, Side, TransportError, Waker, Work,
};
use std::collections::{BTreeMap, VecDeque};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

/// How many polls pass between two questions for events while there are lively lanes.
const LIVELY_POLLS: u32 = 32;
/// After how many polls without a wait the kernel need make no events for lively lanes.
const APART_POLLS: u32 = 64;

/// An endpoint over sockets.
pub(super) struct TcpEndpoint {
    pub(super) listener: TcpListener,
    pub(super) address: SocketAddr,
    pub(super) hello_timeout: Duration,
    spin: Duration,
    busy_poll: Duration,
    pub(super) poller: Poller,
    pub(super) links: BTreeMap<LinkId, Link>,
    next_link: u32,
    /// Connections that have proven nothing yet, oldest first.
    pub(super) greetings: BTreeMap<u64, Greeting>,
    /// Closed lanes that still speak.
    pub(super) lingering: BTreeMap<u64, Linger>,
    /// The number of the last greeting or closed lane.
    pub(super) last_id: u64,
    /// Who is to have a turn, in order.
    pub(super) turns: VecDeque<Token>,
    /// The lanes that a poll looks at without asking the kernel for events first.
    pub(super) lively: Lively,
    polls: u32,
    /// When the waiting began that no byte has ended yet.
    pub(super) idle_since: Option<Instant>,
    /// Somebody wants to be accepted.
    pub(super) knock: bool,
    /// When to look for connections again, having run out of files.
    pub(super) deaf_until: Option<Instant>,
    /// No deadline is earlier than this.
    pub(super) deadline: Option<Instant>,
}

impl TcpEndpoint {
    /// Listens.
    pub(super) fn new(options: &DeviceOptions) -> Result<Self, TransportError> {
        let wanted = SocketAddr::new(options.address, options.port);
        let listener = socket::listen(wanted, options.busy_poll)?;
        let address = listener.local_addr().map_err(|error| TransportError::system(format!("{wanted}"), error))?;
        let poller = Poller::new()?;
        poller.add_listener(&listener)?;
        Ok(Self {
            listener,
            address,
            hello_timeout: options.hello_timeout,
            spin: options.spin,
            busy_poll: options.busy_poll,
            poller,
            links: BTreeMap::new(),
            next_link: 0,
            greetings: BTreeMap::new(),
            lingering: BTreeMap::new(),
            last_id: 0,
            turns: VecDeque::new(),
            lively: Lively::default(),
            polls: 0,
            idle_since: None,
            knock: false,
            deaf_until: None,
            deadline: None,
        })
    }

    /// A fresh number for a greeting or a closed lane.
    pub(super) fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Remembers that something is due.
    pub(super) fn remind(&mut self, due: Instant) {
        self.deadline = Some(self.deadline.map_or(due, |earlier| earlier.min(due)));
    }

    fn connected(&mut self, id: LinkId) -> Result<&mut Link, TransportError> {
        let link = self.links.get_mut(&id).ok_or(TransportError::NoLink(id))?;
        if link.phase != Phase::Connected {
            return Err(TransportError::invalid(format!("{id:?} is not connected")));
        }
        Ok(link)
    }

    /// Dials the peer, once for each lane.
    fn dial(&mut self, id: LinkId, peer: SocketAddr) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let LinkSpec { incarnation, lanes, .. } = link.spec;
        for lane in 0..lanes {
            let dial = Dial::new(peer, incarnation, lane, lanes, self.busy_poll)
                .map_err(|error| error.to_string())
                .and_then(|dial| {
                    self.poller.add(&dial.socket, Token::Lane(id, lane)).map_err(|error| error.to_string())?;
                    Ok(dial)
                });
            match dial {
                Ok(dial) => link.seats[usize::from(lane)] = Seat::Dialling(dial),
                Err(why) => {
                    link.verdict = Some(Disconnect::NotConnected(format!("{peer}: {why}")));
                    return;
                }
            }
        }
    }

    /// Keeps a lane that is closed here until it has said what it has to say.
    pub(super) fn linger(&mut self, linger: Linger) {
        let id = self.new_id();
        if self.poller.rename(&linger.socket, Token::Linger(id)).is_ok() {
            self.remind(linger.deadline);
            self.lingering.insert(id, linger);
            self.advance_linger(id);
        }
    }

    /// Takes in what the poller has counted; whether the waker was among it.
    fn note(&mut self, events: usize) -> bool {
        let mut woken = false;
        for index in 0..events {
            let (token, hangup) = self.poller.event(index);
            match token {
                Token::Waker => woken = true,
                Token::Listener => self.knock = true,
                Token::Lane(link, lane) => self.queue_lane(link, lane, hangup),
                _ => self.turns.push_back(token),
            }
        }
        woken
    }

    /// Gives a lane a turn, one at a time.
    pub(super) fn queue_lane(&mut self, id: LinkId, lane: u8, hangup: bool) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let bit = 1 << lane;
        if hangup {
            link.hangup |= bit;
        }
        if link.queued & bit == 0 {
            link.queued |= bit;
            self.turns.push_back(Token::Lane(id, lane));
        }
    }

    /// Lets the kernel make no events for the lively lanes, or again.
    fn set_apart(&mut self, apart: bool) {
        for (id, lane) in self.lively.lanes() {
            let link = self.links.get_mut(&id);
            if let Some(Seat::Open(lane)) = link.and_then(|link| link.seats.get_mut(usize::from(lane))) {
                lane.set_apart(&self.poller, apart);
            }
        }
    }

    fn has_turns(&self) -> bool {
        self.knock || !self.turns.is_empty()
    }

    /// Collects events; whether `wait` should return.
    fn stir(&mut self, timeout: Duration) -> Result<bool, TransportError> {
        let events = self.poller.collect(timeout)?;
        let woken = self.note(events);
        if woken {
            self.poller.calm();
        }
        Ok(woken || self.has_turns())
    }
}

impl Endpoint for TcpEndpoint {
    fn open(&mut self, spec: LinkSpec) -> Result<(LinkId, Descriptor), TransportError> {
        let LinkSpec { incarnation, lanes, side, .. } = spec;
        if lanes == 0 || lanes > MAX_LANES {
            return Err(TransportError::invalid(format!("{lanes} lanes: a link has 1 to {MAX_LANES}")));
        }
        if self.links.values().any(|link| link.spec.incarnation == incarnation && link.spec.side == side) {
            return Err(TransportError::invalid(format!("incarnation {incarnation} has a link already")));
        }
        let id = LinkId(self.next_link);
        let next = self.next_link.checked_add(1);
        self.next_link = next.ok_or_else(|| TransportError::invalid("this endpoint has used up all link numbers"))?;
        self.links.insert(id, Link::new(id, spec));
        Ok((id, LinkHalf { incarnation, address: self.address }.encode()))
    }

    fn connect(&mut self, id: LinkId, peer: &[u8], timeout: Duration) -> Result<(), TransportError> {
        let link = self.links.get_mut(&id).ok_or(TransportError::NoLink(id))?;
        if link.phase != Phase::Opened {
            return Err(TransportError::invalid(format!("{id:?} was connected before")));
        }
        let half = LinkHalf::decode(peer)?;
        let now = Instant::now();
        let deadline = now.checked_add(timeout).unwrap_or(now + Duration::from_secs(86_400 * 365));
        link.phase = Phase::Connecting { deadline };
        if half.incarnation != link.spec.incarnation {
            let what =
                format!("the peer is of incarnation {}, the link of {}", half.incarnation, link.spec.incarnation);
            link.verdict = Some(Disconnect::Rejected(what));
        } else if link.spec.side == Side::Active {
            self.dial(id, half.address);
        }
        self.remind(deadline);
        self.turns.push_back(Token::Link(id));
        Ok(())
    }

    fn grant(&mut self, id: LinkId, region: &Region, access: Access) -> Result<Descriptor, TransportError> {
        let link = self.connected(id)?;
        may_grant(region, access)?;
        loop {
            let mut key = [0; 8];
            getrandom::fill(&mut key)
                .map_err(|error| TransportError::system("drawing a key", std::io::Error::other(error.to_string())))?;
            let key = u64::from_le_bytes(key);
            if link.grants.insert(key, region.clone(), access) {
                let incarnation = link.spec.incarnation;
                return Ok(Granted { incarnation, key, len: region.len() as u64, access }.encode());
            }
        }
    }

    fn import(
        &mut self,
        id: LinkId,
        descriptor: &[u8],
        _placement: Option<Placement>,
    ) -> Result<RemoteRegion, TransportError> {
        let link = self.connected(id)?;
        let Granted { incarnation, key, len, access } = Granted::decode(descriptor)?;
        if incarnation != link.spec.incarnation {
            let what = format!("granted over incarnation {incarnation}, this link is {}", link.spec.incarnation);
            return Err(TransportError::Descriptor { provider: Provider::Tcp, what });
        }
        Ok(RemoteRegion { link: id, key, len, access, mapped: None })
    }

    fn close(&mut self, id: LinkId) {
        let Some(link) = self.links.remove(&id) else { return };
        self.lively.forget(id);
        for seat in link.seats {
            if let Seat::Open(mut lane) = seat {
                lane.set_apart(&self.poller, false);
                let (socket, rest) = lane.part(true, Header::plain(Opcode::Bye, link.spec.incarnation));
                self.linger(Linger::new(socket, rest));
            }
        }
    }

    fn post(&mut self, id: LinkId, lane: u8, chain: &[Work<'_>]) -> Result<(), PostError> {
        let link = self.links.get_mut(&id).ok_or(PostError::NotConnected(id))?;
        if link.post(lane, chain)? {
            self.queue_lane(id, lane, false);
        }
        Ok(())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError> {
        let before = completions.len();
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(APART_POLLS) {
            self.set_apart(true);
        }
        if self.lively.is_empty() || self.polls.is_multiple_of(LIVELY_POLLS) {
            let events = self.poller.collect(Duration::ZERO)?;
            self.note(events);
        }
        for (link, lane) in self.lively.lanes() {
            self.queue_lane(link, lane, false);
        }
        self.progress(completions);
        Ok(completions.len() - before)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), TransportError> {
        if self.has_turns() {
            return Ok(());
        }
        let start = Instant::now();
        // A poll that tries the lively sockets is quicker than to ask for events first and to try the socket then.
        if !self.spin.is_zero() && !self.lively.is_empty() {
            let since = *self.idle_since.get_or_insert(start);
            if start - since < self.spin {
                return Ok(());
            }
        }
        self.polls = 0;
        self.set_apart(false);
        let timeout = self.deadline.map_or(timeout, |due| timeout.min(due.saturating_duration_since(start)));
        let spin = self.spin.min(timeout);
        while start.elapsed() < spin {
            if self.stir(Duration::ZERO)? {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.stir(timeout.saturating_sub(spin))?;
        Ok(())
    }

    fn waker(&self) -> Waker {
        Waker(self.poller.waker())
    }
}
