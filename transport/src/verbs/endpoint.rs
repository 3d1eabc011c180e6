//! The endpoint: what its owner asks for. What the device brings is in `progress`.

use super::MAX_LANES;
use super::chain::Scratch;
use super::completion_queue::CompletionQueue;
use super::connection_manager::ConnectionManager;
use super::context::Context;
use super::control::{self, Control, Message};
use super::descriptor::{Contact, Granted, LinkHalf};
use super::link::{CONTROL_RAIL, Link, Phase};
use super::memory::Grant;
use super::options::Connect;
use super::progress::Clock;
use super::sleep::Sleep;
use crate::{
    Access, Completion, Descriptor, Disconnect, Endpoint, LinkId, LinkSpec, Placement, PostError, Provider, Region,
    RemoteRegion, Side, TransportError, Waker, Work,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a control queue pair outlives its link to say its last word.
const LAST_WORD: Duration = Duration::from_secs(1);
/// How long a dropped endpoint waits for that.
const LAST_WORDS_AT_EXIT: Duration = Duration::from_millis(200);

/// A rail as one endpoint uses it. Fields drop in this order.
pub(super) struct Rail {
    /// Everything that the endpoint's queue pairs on this rail complete.
    pub(super) queue: CompletionQueue,
    pub(super) context: Arc<Context>,
    /// The context's losses that the links were told of.
    pub(super) losses: u64,
}

/// An endpoint on a device. Fields drop in this order.
pub(super) struct VerbsEndpoint {
    pub(super) links: BTreeMap<LinkId, Link>,
    /// Control queue pairs of links that are gone, until when they may speak.
    pub(super) lingering: BTreeMap<LinkId, (Control, Instant)>,
    /// In the order of the device's; never empty.
    pub(super) rails: Vec<Rail>,
    /// Where queue pairs are connected by it.
    pub(super) manager: Option<ConnectionManager>,
    /// The rail that is polled first.
    pub(super) turn: usize,
    next_link: u32,
    scratch: Scratch,
    sleep: Sleep,
    spin: Duration,
    pub(super) clock: Clock,
    /// No deadline is earlier than this.
    pub(super) due: Option<Instant>,
}

impl VerbsEndpoint {
    /// An endpoint without links.
    pub(super) fn new(contexts: &[Arc<Context>], spin: Duration) -> Result<Self, TransportError> {
        let rail = |context: &Arc<Context>| {
            let queue = CompletionQueue::new(context)?;
            // What was lost before is none of this endpoint's.
            context.take_events();
            Ok(Rail { queue, context: context.clone(), losses: context.losses() })
        };
        let rails = contexts.iter().map(rail).collect::<Result<Vec<_>, TransportError>>()?;
        let by_manager = contexts.iter().any(|context| context.options.connect == Connect::ConnectionManager);
        let manager = by_manager.then(|| ConnectionManager::new(contexts)).transpose()?;
        let events = rails.iter().flat_map(|rail| [rail.queue.event_fd(), rail.context.event_fd()]);
        let events: Vec<_> = events.chain(manager.as_ref().map(ConnectionManager::event_fd)).collect();
        let sleep = Sleep::new(&events)?;
        let longest = contexts.iter().map(|context| context.limits.queue_depth).max();
        Ok(Self {
            links: BTreeMap::new(),
            lingering: BTreeMap::new(),
            rails,
            manager,
            turn: 0,
            next_link: 0,
            scratch: Scratch::new(longest.unwrap_or(0)),
            sleep,
            spin,
            clock: Clock::new(),
            due: None,
        })
    }

    /// Whether something has completed.
    fn look(&mut self) -> Result<bool, TransportError> {
        for rail in &mut self.rails {
            if rail.queue.look()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Remembers that something is due.
    pub(super) fn remind(&mut self, due: Instant) {
        self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
    }

    fn connected(&mut self, id: LinkId) -> Result<(&mut Link, &[Rail]), TransportError> {
        let link = self.links.get_mut(&id).ok_or(TransportError::NoLink(id))?;
        if link.phase != Phase::Connected {
            return Err(TransportError::invalid(format!("{id:?} is not connected")));
        }
        Ok((link, &self.rails))
    }

    /// Lets a control queue pair say what it still has to say.
    pub(super) fn linger(&mut self, id: LinkId, control: Control) {
        if control.failed || control.unsent == 0 {
            return self.rails[CONTROL_RAIL].queue.retire(control::COMPLETIONS);
        }
        let deadline = Instant::now() + LAST_WORD;
        self.lingering.insert(id, (control, deadline));
        self.remind(deadline);
    }
}

impl Endpoint for VerbsEndpoint {
    fn open(&mut self, spec: LinkSpec) -> Result<(LinkId, Descriptor), TransportError> {
        if spec.lanes == 0 || spec.lanes > MAX_LANES {
            return Err(TransportError::invalid(format!("{} lanes: a link has 1 to {MAX_LANES}", spec.lanes)));
        }
        let id = LinkId(self.next_link);
        let next = self.next_link.checked_add(1);
        self.next_link = next.ok_or_else(|| TransportError::invalid("this endpoint has used up all link numbers"))?;
        let mut link = Link::new(&mut self.rails, id, spec)?;
        let described = link
            .await_connections(self.manager.as_mut())
            .and_then(|()| link.describe(&self.rails, self.manager.as_ref()).ok_or(TransportError::NoLink(id)));
        if described.is_err() {
            link.drop_lanes(&mut self.rails);
            link.drop_control(&mut self.rails);
        }
        let descriptor = described?;
        if link.awaits_connections() {
            self.remind(Instant::now());
        }
        self.links.insert(id, link);
        Ok((id, descriptor))
    }

    fn connect(&mut self, id: LinkId, peer: &[u8], timeout: Duration) -> Result<(), TransportError> {
        let link = self.links.get_mut(&id).ok_or(TransportError::NoLink(id))?;
        if link.phase != Phase::Opened {
            return Err(TransportError::invalid(format!("{id:?} was connected before")));
        }
        let (half, proven) = LinkHalf::decode(peer, &link.spec)?;
        let LinkSpec { incarnation, lanes, side, .. } = link.spec;
        let now = Instant::now();
        let refused = if half.incarnation != incarnation {
            Some(format!("the peer is of incarnation {}, the link of {incarnation}", half.incarnation))
        } else if !proven {
            Some("the link secret was not proven".to_owned())
        } else if half.lanes != lanes {
            Some(format!("the peer has {} lanes, the link {lanes}", half.lanes))
        } else if matches!(half.contact, Contact::Listeners { .. }) != link.connections.is_some() {
            Some("one end connects by the connection manager, the other by descriptors".into())
        } else {
            None
        };
        if let Some(why) = refused {
            link.end_by(now, Disconnect::Rejected(why));
            self.remind(now);
            return Ok(());
        }
        link.peer = Some(half);
        link.phase =
            Phase::Connecting { deadline: now.checked_add(timeout).unwrap_or(now + Duration::from_secs(86_400)) };
        if link.connections.is_some() {
            self.establish(id, now);
        } else if let Err(error) = link.connect() {
            link.end_by(now, Disconnect::NotConnected(error.to_string()));
        } else if let (Side::Active, Some(control)) = (side, &mut link.control) {
            control.send(Message::Hello);
        }
        self.remind(now);
        Ok(())
    }

    fn grant(&mut self, id: LinkId, region: &Region, access: Access) -> Result<Descriptor, TransportError> {
        let (link, rails) = self.connected(id)?;
        let grant = Grant::new(link.rails(rails).iter().map(|rail| &rail.context), region, access)?;
        let (incarnation, keys, len) = (link.spec.incarnation, grant.remote_keys(), region.len() as u64);
        link.grants.push(grant);
        Ok(Granted { incarnation, keys, len, access }.encode())
    }

    fn import(
        &mut self,
        id: LinkId,
        descriptor: &[u8],
        _placement: Option<Placement>,
    ) -> Result<RemoteRegion, TransportError> {
        let (link, _) = self.connected(id)?;
        let Granted { incarnation, keys, len, access } = Granted::decode(descriptor)?;
        let refuse = |what| Err(TransportError::Descriptor { provider: Provider::Verbs, what });
        if incarnation != link.spec.incarnation {
            return refuse(format!("granted over incarnation {incarnation}, this link is {}", link.spec.incarnation));
        }
        let rails = link.peer.as_ref().map_or(0, |peer| peer.contact.rails());
        if keys.len() != rails {
            return refuse(format!("{} keys, from a peer with {rails} rails", keys.len()));
        }
        let mut number = 0;
        for (lane, &key) in link.lanes.iter_mut().zip(keys.iter().cycle()) {
            number = lane.import(key);
        }
        // The upper half names the link, so that a key is not used on another.
        let key = u64::from(incarnation) << 32 | number as u64;
        Ok(RemoteRegion { link: id, key, len, access, mapped: None })
    }

    fn close(&mut self, id: LinkId) {
        let Some(mut link) = self.links.remove(&id) else { return };
        let told = !link.was_dialled();
        link.drop_lanes(&mut self.rails);
        if let Some(mut control) = link.control.take() {
            if !told {
                control.send(Message::Bye);
            }
            self.linger(id, control);
        }
    }

    fn post(&mut self, id: LinkId, lane: u8, chain: &[Work<'_>]) -> Result<(), PostError> {
        let link = self.links.get_mut(&id).ok_or(PostError::NotConnected(id))?;
        if link.phase != Phase::Connected {
            return Err(PostError::NotConnected(id));
        }
        let Some(lane) = link.lanes.get_mut(usize::from(lane)) else {
            return Err(PostError::Invalid(format!("lane {lane} of a link that has {}", link.spec.lanes)));
        };
        match lane.post(link.spec.incarnation, chain, &mut self.scratch)? {
            Ok(()) => {}
            Err(why) => self.end(id, Disconnect::Protocol(why), Some(Message::Lost)),
        }
        Ok(())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError> {
        let before = completions.len();
        self.progress(completions)?;
        Ok(completions.len() - before)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), TransportError> {
        self.clock.wind();
        let start = Instant::now();
        let timeout = self.due.map_or(timeout, |due| timeout.min(due.saturating_duration_since(start)));
        let spin = self.spin.min(timeout);
        loop {
            if self.look()? || self.sleep.was_woken() {
                return Ok(());
            }
            if start.elapsed() >= spin {
                break;
            }
            std::hint::spin_loop();
        }
        let rest = timeout.saturating_sub(start.elapsed());
        if rest.is_zero() {
            return Ok(());
        }
        for rail in &mut self.rails {
            rail.queue.arm()?;
        }
        if !self.look()? {
            self.sleep.sleep(rest)?;
        }
        self.rails.iter_mut().for_each(|rail| rail.queue.calm());
        self.sleep.was_woken();
        // The devices' events would end the next sleep at once, and so would the connection manager's.
        self.rails.iter().for_each(|rail| rail.context.take_events());
        let called = self.manager.as_mut().is_some_and(ConnectionManager::listen_up);
        if called || self.rails.iter().any(|rail| rail.context.losses() != rail.losses) {
            self.remind(start);
        }
        Ok(())
    }

    fn waker(&self) -> Waker {
        Waker(self.sleep.waker())
    }
}

impl Drop for VerbsEndpoint {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_WORDS_AT_EXIT;
        let mut completions = Vec::new();
        while !self.lingering.is_empty() && Instant::now() < deadline {
            if self.progress(&mut completions).is_err() || self.wait(Duration::from_millis(5)).is_err() {
                return;
            }
        }
    }
}
