//! What both sides share: joining, links from their opening to their fence, arrivals checked before anyone sees them.
//!
//! A link is born with the scheduler's `OpenLink`, which names a fresh incarnation and secret. Each end opens its half
//! and sends the offer; connects when the other's offer is there; grants fresh regions when connected; is up when it
//! has taken up the other's grants. It ends by being **fenced**: closed, its regions dropped, nothing of it still in
//! use, and `LinkDown` said. When both ends have said so the scheduler opens the next incarnation.

use crate::control::{Control, ControlEvent};
use crate::counter::Counted;
use crate::layout::{Direction, SlotLayout};
use crate::link::{InUse, Link, Stage};
use crate::{MeshError, MeshEvent, Peer, Role};
use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use stepmesh_proto::control::{self, FromMember, from_member, to_member};
use stepmesh_proto::{Flags, Header, Immediate};
use stepmesh_transport::{
    Access, AddressSpace, Clock, Completion, Device, Endpoint, LinkId, LinkSecret, LinkSpec, Placement, Region, Side,
    TransportError, Waker,
};

/// How a member joins. [`MemberOptions::new`] gives defaults that work on one host.
#[derive(Clone, Debug)]
pub struct MemberOptions {
    /// What the slots look like; all members must agree.
    pub layout: Arc<SlotLayout>,
    /// What is computed, for people and for comparison; all members must agree.
    pub workload: String,
    /// For people: host and purpose.
    pub name: String,
    /// The rank to ask for; the lowest free one otherwise.
    pub rank: Option<u32>,
    /// Lanes of each link, 1 to 8.
    pub lanes: u8,
    /// Payloads below this many bytes go over one lane: striping costs more than it brings.
    pub stripe_bytes: usize,
    /// Most bytes of registered memory that the slots may take.
    pub memory_limit_bytes: usize,
    /// How long a link may take from its opening until it is up.
    pub connect_timeout: Duration,
    /// How long other transfers on a link may go on before a cancelled ticket's fence cuts them off.
    pub drain: Duration,
}

impl MemberOptions {
    /// Options with everything but the layout and the workload at its default.
    pub fn new(layout: SlotLayout, workload: impl Into<String>) -> Self {
        Self {
            layout: Arc::new(layout),
            workload: workload.into(),
            name: String::new(),
            rank: None,
            lanes: 1,
            stripe_bytes: 64 * 1024,
            memory_limit_bytes: 4 << 30,
            connect_timeout: Duration::from_secs(10),
            drain: Duration::from_millis(100),
        }
    }
}

/// A transfer that has landed whole, from a peer whose link is up, and fits the layout.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) rank: usize,
    pub(crate) header: Header,
    pub(crate) received_ns: u64,
}

/// A link that has ended: what was under way on it is lost.
#[derive(Clone, Debug)]
pub(crate) struct LinkEnd {
    pub(crate) rank: usize,
    pub(crate) peer: Peer,
    pub(crate) reason: String,
}

/// A link that is closed but whose slots are still in use by the application.
struct Fencing {
    incarnation: u32,
    reason: String,
    in_use: Weak<InUse>,
}

/// One member: its endpoint, its session with the scheduler, its links by the peer's rank.
pub(crate) struct Member {
    pub(crate) role: Role,
    pub(crate) options: MemberOptions,
    pub(crate) clock: Clock,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) endpoint: Box<dyn Endpoint>,
    control: Box<dyn Control>,
    pub(crate) rank: Option<u32>,
    pub(crate) peers: usize,
    /// Members of this side.
    pub(crate) siblings: usize,
    pub(crate) complete: bool,
    epoch: u64,
    pub(crate) links: Vec<Option<Link>>,
    by_id: Vec<(LinkId, usize)>,
    fencing: Vec<Fencing>,
    /// The peers' payload areas, side by side (FFN side).
    pub(crate) space: Option<Arc<AddressSpace>>,
    /// This side's send slots (attention side).
    pub(crate) outbox: Option<Region>,
    completions: Vec<Completion>,
    pub(crate) arrivals: Vec<Arrival>,
    pub(crate) ended: VecDeque<LinkEnd>,
    pub(crate) events: VecDeque<MeshEvent>,
    pub(crate) scheduler_lost: Option<String>,
}

impl Member {
    /// Says hello. The answer comes with [`Member::poll`].
    pub(crate) fn new(
        role: Role,
        options: MemberOptions,
        device: Arc<dyn Device>,
        endpoint: Box<dyn Endpoint>,
        mut control: Box<dyn Control>,
        clock: Clock,
    ) -> Result<Self, MeshError> {
        let properties = device.properties();
        if options.lanes == 0 || options.lanes > properties.max_lanes {
            return Err(MeshError::Layout(format!(
                "{} lanes: {} has 1 to {}",
                options.lanes, properties.provider, properties.max_lanes
            )));
        }
        let hello = control::Hello {
            control_version: control::CONTROL_VERSION,
            wire_version: u32::from(stepmesh_proto::WIRE_VERSION),
            role: role.to_control() as i32,
            rank: options.rank,
            name: options.name.clone(),
            transport: properties.provider.name().into(),
            lanes: u32::from(options.lanes),
            layout: options.layout.describe(),
            workload: options.workload.clone(),
            pid: u64::from(std::process::id()),
        };
        control
            .send(FromMember { body: Some(from_member::Body::Hello(hello)) })
            .map_err(|error| MeshError::SchedulerLost(error.to_string()))?;
        Ok(Self {
            role,
            options,
            clock,
            device,
            endpoint,
            control,
            rank: None,
            peers: 0,
            siblings: 0,
            complete: false,
            epoch: 0,
            links: Vec::new(),
            by_id: Vec::new(),
            fencing: Vec::new(),
            space: None,
            outbox: None,
            completions: Vec::with_capacity(256),
            arrivals: Vec::with_capacity(256),
            ended: VecDeque::new(),
            events: VecDeque::new(),
            scheduler_lost: None,
        })
    }

    /// The direction of what this member sends.
    pub(crate) fn sends(&self) -> Direction {
        match self.role {
            Role::Attention => Direction::A2F,
            Role::Ffn => Direction::F2A,
        }
    }

    fn receives(&self) -> Direction {
        match self.role {
            Role::Attention => Direction::F2A,
            Role::Ffn => Direction::A2F,
        }
    }

    fn maps(&self) -> bool {
        self.device.properties().maps_peer_memory
    }

    /// Whether the peer's payloads are read in its own memory.
    fn reads_in_place(&self) -> bool {
        self.role == Role::Ffn && self.maps()
    }

    pub(crate) fn waker(&self) -> Waker {
        self.endpoint.waker()
    }

    /// Bytes between the payload areas of successive ranks, as the FFN side sees them.
    pub(crate) fn stride_bytes(&self) -> Result<usize, MeshError> {
        let area = self.options.layout.area_bytes(Direction::A2F)?;
        Ok(if self.maps() { area } else { area + self.options.layout.headers_bytes() })
    }

    /// Sends a message of the application's to the scheduler.
    pub(crate) fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        self.control.send(FromMember { body: Some(body) }).map_err(|error| MeshError::SchedulerLost(error.to_string()))
    }

    /// Makes progress: fills `arrivals`, `ended` and `events`.
    pub(crate) fn poll(&mut self) -> Result<(), MeshError> {
        self.poll_control()?;
        let mut completions = std::mem::take(&mut self.completions);
        completions.clear();
        let polled = self.endpoint.poll(&mut completions);
        for completion in completions.drain(..) {
            self.handle_completion(completion);
        }
        self.completions = completions;
        polled?;
        self.tend_links();
        Ok(())
    }

    fn poll_control(&mut self) -> Result<(), MeshError> {
        while let Some(event) = self.control.poll() {
            match event {
                ControlEvent::Message(message) => {
                    if let Some(body) = message.body {
                        self.handle_control(body)?;
                    }
                }
                ControlEvent::Lost(reason) => {
                    self.complete = false;
                    self.scheduler_lost = Some(reason.clone());
                    self.events.push_back(MeshEvent::SchedulerLost(reason));
                }
            }
        }
        Ok(())
    }

    fn handle_control(&mut self, body: to_member::Body) -> Result<(), MeshError> {
        match body {
            to_member::Body::Welcome(welcome) => self.welcome(&welcome)?,
            to_member::Body::Refused(refused) => return Err(MeshError::Refused(refused.reason)),
            to_member::Body::OpenLink(open) => self.open_link(open),
            to_member::Body::LinkOffer(offer) => {
                if let Some(rank) = self.rank_of(offer.incarnation) {
                    let timeout = self.options.connect_timeout;
                    let Some(link) = self.links[rank].as_ref() else { return Ok(()) };
                    let connected = self.endpoint.connect(link.id, &offer.descriptor, timeout);
                    if let Err(error) = connected {
                        self.fence(rank, error.to_string());
                    }
                }
            }
            to_member::Body::LinkGrants(grants) => {
                if let Some(rank) = self.rank_of(grants.incarnation)
                    && let Some(link) = self.links[rank].as_mut()
                {
                    link.grants = Some(grants.descriptors);
                    self.take_up_grants(rank);
                }
            }
            to_member::Body::CloseLink(close) => {
                if let Some(rank) = self.rank_of(close.incarnation) {
                    self.fence(rank, close.reason);
                }
            }
            to_member::Body::PeerLost(lost) => {
                let Some(peer) = lost.peer.as_ref().and_then(Peer::from_control) else { return Ok(()) };
                if peer.role != self.role
                    && let Some(rank) = self
                        .links
                        .iter()
                        .position(|link| link.as_ref().is_some_and(|link| link.peer.member == peer.member))
                {
                    self.end_link(rank, lost.reason.clone());
                }
                self.events.push_back(MeshEvent::PeerLost { peer, reason: lost.reason });
            }
            to_member::Body::Epoch(epoch) => {
                self.epoch = epoch.epoch;
                self.complete = epoch.complete;
                self.events.push_back(MeshEvent::Epoch { epoch: epoch.epoch, complete: epoch.complete });
            }
            application => self.events.push_back(MeshEvent::Control(application)),
        }
        Ok(())
    }

    /// Checks that the memory is allowed, then registers all of it that does not depend on a peer.
    fn welcome(&mut self, welcome: &control::Welcome) -> Result<(), MeshError> {
        let attention_side = self.role == Role::Attention;
        let peers = if attention_side { welcome.ffn } else { welcome.attention } as usize;
        let needed = self.options.layout.member_bytes(attention_side, peers)?;
        if needed > self.options.memory_limit_bytes {
            return Err(MeshError::Memory {
                needed,
                limit: self.options.memory_limit_bytes,
                layout: self.options.layout.describe(),
                peers,
            });
        }
        tracing::info!(role = %self.role, rank = welcome.rank, bytes = needed, "joined; registering slots");
        if attention_side {
            let access = if self.maps() { Access::PeerRead } else { Access::Local };
            let bytes = self.options.layout.area_bytes(Direction::A2F)?;
            self.outbox = Some(self.device.allocate(bytes, access, None)?);
        } else {
            self.space = Some(AddressSpace::reserve(self.stride_bytes()?.saturating_mul(peers))?);
        }
        self.peers = peers;
        self.siblings = if attention_side { welcome.attention } else { welcome.ffn } as usize;
        self.links = (0..peers).map(|_| None).collect();
        self.rank = Some(welcome.rank);
        self.epoch = welcome.epoch;
        self.events.push_back(MeshEvent::Joined { rank: welcome.rank, epoch: welcome.epoch });
        Ok(())
    }

    fn rank_of(&self, incarnation: u32) -> Option<usize> {
        self.links.iter().position(|link| link.as_ref().is_some_and(|link| link.incarnation == incarnation))
    }

    fn open_link(&mut self, open: control::OpenLink) {
        let Some(peer) = open.peer.as_ref().and_then(Peer::from_control) else { return };
        let rank = peer.rank as usize;
        let Ok(secret) = <[u8; 16]>::try_from(open.secret.as_slice()) else { return };
        if peer.role == self.role || rank >= self.links.len() {
            return;
        }
        if self.links[rank].is_some() {
            self.end_link(rank, "replaced by a new link".into());
        }
        let spec = LinkSpec {
            incarnation: open.incarnation,
            secret: LinkSecret(secret),
            lanes: self.options.lanes,
            side: if self.role == Role::Attention { Side::Active } else { Side::Passive },
        };
        match self.endpoint.open(spec) {
            Ok((id, descriptor)) => {
                let deadline = self.clock.now() + self.options.connect_timeout;
                let link = Link::new(peer, open.incarnation, id, &self.options, deadline);
                self.links[rank] = Some(link);
                self.by_id.push((id, rank));
                let incarnation = open.incarnation;
                self.say(from_member::Body::LinkOffer(control::LinkOffer { incarnation, descriptor }));
            }
            Err(error) => self.say_down(open.incarnation, error.to_string()),
        }
    }

    /// A message whose loss is the session's loss, which the next poll reports.
    fn say(&mut self, body: from_member::Body) {
        if let Err(error) = self.control.send(FromMember { body: Some(body) }) {
            tracing::debug!(%error, "a control message was not sent");
        }
    }

    fn say_down(&mut self, incarnation: u32, reason: String) {
        self.say(from_member::Body::LinkDown(control::LinkDown { incarnation, reason }));
    }

    fn handle_completion(&mut self, completion: Completion) {
        let find = |by_id: &[(LinkId, usize)], id| by_id.iter().find(|(known, _)| *known == id).map(|&(_, rank)| rank);
        match completion {
            Completion::Immediate { link, immediate, .. } => {
                if let Some(rank) = find(&self.by_id, link) {
                    self.handle_immediate(rank, immediate);
                }
            }
            Completion::Connected { link } => {
                if let Some(rank) = find(&self.by_id, link)
                    && let Err(error) = self.grant(rank)
                {
                    self.fence(rank, error.to_string());
                }
            }
            Completion::Disconnected { link, reason } => {
                if let Some(rank) = find(&self.by_id, link) {
                    self.fence(rank, reason.to_string());
                }
            }
            // Failed work ends its link, which has a completion of its own.
            Completion::Sent { .. } => {}
        }
    }

    /// Allocates this incarnation's landing slots, grants them, and sends the descriptors.
    fn grant(&mut self, rank: usize) -> Result<(), MeshError> {
        let layout = self.options.layout.clone();
        let headers = layout.headers_bytes();
        let (bytes, placement) = if self.reads_in_place() {
            (headers, None)
        } else {
            let bytes = headers + layout.area_bytes(self.receives())?;
            let place = match &self.space {
                Some(space) => Some(Placement::take(space, rank * self.stride_bytes()?, bytes)?),
                None => None,
            };
            (bytes, place)
        };
        let inbox = self.device.allocate(bytes, Access::PeerWrite, placement)?;
        let outbox = match self.role {
            Role::Attention => self.outbox.clone().filter(|_| !self.maps()),
            Role::Ffn if self.maps() => None,
            Role::Ffn => Some(self.device.allocate(layout.area_bytes(Direction::F2A)?, Access::Local, None)?),
        };
        let shares = self.outbox.clone().filter(|_| self.role == Role::Attention && self.maps());
        let Some(link) = self.links[rank].as_mut() else { return Ok(()) };
        let mut descriptors = vec![self.endpoint.grant(link.id, &inbox, Access::PeerWrite)?];
        if let Some(shared) = &shares {
            descriptors.push(self.endpoint.grant(link.id, shared, Access::PeerRead)?);
        }
        link.inbox = Some(inbox);
        link.outbox = outbox;
        link.stage = Stage::Granting;
        let incarnation = link.incarnation;
        self.say(from_member::Body::LinkGrants(control::LinkGrants { incarnation, descriptors }));
        self.take_up_grants(rank);
        Ok(())
    }

    /// Imports the peer's regions when both they and the connection are there; the link is then up.
    fn take_up_grants(&mut self, rank: usize) {
        match self.try_import(rank) {
            Ok(true) => {
                let Some(link) = self.links[rank].as_mut() else { return };
                link.stage = Stage::Up;
                let incarnation = link.incarnation;
                let early = std::mem::take(&mut link.early);
                let peer = link.peer.clone();
                self.events.push_back(MeshEvent::LinkUp(peer));
                self.say(from_member::Body::LinkUp(control::LinkUp { incarnation }));
                for immediate in early {
                    self.handle_immediate(rank, immediate);
                }
            }
            Ok(false) => {}
            Err(error) => self.fence(rank, error.to_string()),
        }
    }

    fn try_import(&mut self, rank: usize) -> Result<bool, MeshError> {
        let in_place = self.reads_in_place();
        let stride = self.stride_bytes()?;
        let (request_area, headers) =
            (self.options.layout.area_bytes(Direction::A2F)?, self.options.layout.headers_bytes());
        let sends = self.options.layout.area_bytes(self.sends())?;
        let Some(link) = self.links[rank].as_mut() else { return Ok(false) };
        let Some(grants) = link.grants.as_ref().filter(|_| link.stage == Stage::Granting) else { return Ok(false) };
        let expected = if in_place { 2 } else { 1 };
        if grants.len() != expected {
            return Err(MeshError::Refused(format!("{} regions granted, expected {expected}", grants.len())));
        }
        if link.peer_inbox.is_none() {
            let inbox = self.endpoint.import(link.id, &grants[0], None)?;
            let payload =
                if self.role == Role::Attention && self.device.properties().maps_peer_memory { 0 } else { sends };
            if inbox.access != Access::PeerWrite || inbox.len < (headers + payload) as u64 {
                return Err(MeshError::Refused(format!(
                    "a landing region of {} bytes with {:?}",
                    inbox.len, inbox.access
                )));
            }
            link.peer_inbox = Some(inbox);
        }
        if in_place && link.peer_outbox.is_none() {
            let Some(space) = &self.space else { return Ok(false) };
            let placement = match Placement::take(space, rank * stride, request_area) {
                Ok(placement) => placement,
                // A batch of the earlier incarnation is still in use: later.
                Err(TransportError::PlaceTaken { .. }) => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            let outbox = self.endpoint.import(link.id, &grants[1], Some(placement))?;
            let mapped = outbox.mapped.filter(|region| region.len() >= request_area);
            let missing = || MeshError::Refused(format!("send slots of {} bytes", outbox.len));
            link.peer_outbox = Some(mapped.ok_or_else(missing)?);
        }
        Ok(true)
    }

    fn handle_immediate(&mut self, rank: usize, bits: u32) {
        let received_ns = self.clock.now_ns();
        let receives = self.receives();
        let Some(link) = self.links[rank].as_mut() else { return };
        if link.stage == Stage::Granting {
            if link.early.len() < usize::from(self.options.layout.microbatches()) * usize::from(link.lanes) {
                link.early.push(bits);
            } else {
                self.fence(
                    rank,
                    "the peer broke the protocol: more transfers than slots before the link was up".into(),
                );
            }
            return;
        }
        match accept(link, &self.options.layout, receives, bits) {
            Ok(Some(header)) => self.arrivals.push(Arrival { rank, header, received_ns }),
            Ok(None) => {}
            Err(reason) => self.fence(rank, format!("the peer broke the protocol: {reason}")),
        }
    }

    /// Ends a link from this side and tells the scheduler once nothing of it is in use.
    pub(crate) fn fence(&mut self, rank: usize, reason: String) {
        let Some(incarnation) = self.links[rank].as_ref().map(|link| link.incarnation) else { return };
        let in_use = self.end_link(rank, reason.clone());
        self.fencing.push(Fencing { incarnation, reason, in_use });
        self.finish_fences();
    }

    /// Lets other transfers on the link finish, then fences it.
    pub(crate) fn drain(&mut self, rank: usize) {
        let until = self.clock.now() + self.options.drain;
        if let Some(link) = self.links[rank].as_mut()
            && link.stage == Stage::Up
        {
            link.stage = Stage::Draining(until);
        }
    }

    /// Closes the link and forgets it; regions go as soon as nobody uses them.
    fn end_link(&mut self, rank: usize, reason: String) -> Weak<InUse> {
        let Some(link) = self.links[rank].take() else { return Weak::new() };
        self.endpoint.close(link.id);
        self.by_id.retain(|(id, _)| *id != link.id);
        self.arrivals.retain(|arrival| arrival.rank != rank);
        self.ended.push_back(LinkEnd { rank, peer: link.peer.clone(), reason: reason.clone() });
        self.events.push_back(MeshEvent::LinkDown { peer: link.peer.clone(), reason });
        Arc::downgrade(&link.in_use)
    }

    fn finish_fences(&mut self) {
        let mut index = 0;
        while index < self.fencing.len() {
            if self.fencing[index].in_use.strong_count() > 0 {
                index += 1;
                continue;
            }
            let fence = self.fencing.swap_remove(index);
            self.say_down(fence.incarnation, fence.reason);
        }
    }

    /// Retries what could not be done at once, and gives up on links that do not come up.
    fn tend_links(&mut self) {
        if !self.fencing.is_empty() {
            self.finish_fences();
        }
        let direction = self.sends();
        let mut late = None;
        for rank in 0..self.links.len() {
            let Some(link) = self.links[rank].as_mut() else { continue };
            match link.stage {
                Stage::Up | Stage::Draining(_) => {
                    if link.has_backlog()
                        && let Err(error) = link.flush(self.endpoint.as_mut(), &self.options.layout, direction)
                    {
                        late = Some((rank, error.to_string()));
                    }
                }
                Stage::Granting | Stage::Connecting => {
                    if self.clock.now() > link.deadline {
                        late = Some((rank, format!("not set up within {:?}", self.options.connect_timeout)));
                    } else if link.stage == Stage::Granting && link.grants.is_some() {
                        self.take_up_grants(rank);
                    }
                }
            }
        }
        if let Some((rank, reason)) = late {
            self.fence(rank, reason);
        }
    }

    /// Whether something must be looked at again soon though no event announces it.
    pub(crate) fn has_chores(&self) -> bool {
        !self.fencing.is_empty()
            || self.links.iter().flatten().any(|link| link.stage != Stage::Up || link.has_backlog())
    }

    /// Posts a transfer to one peer.
    pub(crate) fn send(&mut self, rank: usize, header: Header) -> Result<(), MeshError> {
        let direction = self.sends();
        let Some(link) = self.links[rank].as_mut() else { return Ok(()) };
        link.send(self.endpoint.as_mut(), &self.options.layout, direction, header)
    }

    /// Sleeps until something may have happened, at most until `deadline`.
    pub(crate) fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
        let chore = if self.has_chores() { Duration::from_millis(2) } else { Duration::from_millis(500) };
        let timeout = deadline.saturating_duration_since(self.clock.now()).min(chore);
        Ok(self.endpoint.wait(timeout)?)
    }
}

/// Counts an immediate; when it completes a transfer, reads the header and checks all that a peer can get wrong.
fn accept(link: &mut Link, layout: &SlotLayout, direction: Direction, bits: u32) -> Result<Option<Header>, String> {
    let immediate = Immediate::decode(bits).map_err(|error| error.to_string())?;
    let counter = link.counter(immediate.slot);
    let counter = counter.ok_or_else(|| format!("slot {} of {}", immediate.slot, layout.microbatches()))?;
    match counter.count(immediate) {
        Counted::Partial => return Ok(None),
        Counted::Violation => return Err(format!("{immediate:?} is not the next of its slot")),
        Counted::Complete => {}
    }
    let header = link.landed_header(immediate.slot)?;
    let same = header.incarnation == link.incarnation
        && header.slot == immediate.slot
        && header.sequence == immediate.sequence
        && u32::from(header.source) == link.peer.rank
        && header.flags.has(Flags::REPLY) == (direction == Direction::F2A);
    if !same {
        return Err(format!(
            "the header of slot {} says incarnation {}, slot {}, sequence {}, source {}",
            immediate.slot, header.incarnation, header.slot, header.sequence, header.source
        ));
    }
    layout.check(direction, &header).map_err(|error| error.to_string())?;
    Ok(Some(header))
}
