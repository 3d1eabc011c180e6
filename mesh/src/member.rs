//! What both sides share: joining, news from the scheduler and the endpoint, arrivals checked before anyone sees them.

mod links;

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
use stepmesh_transport::{Access, AddressSpace, Clock, Completion, Device, Endpoint, LinkId, Region, Waker};

/// How many polls may find arrivals before the scheduler is listened to all the same.
const UNHEARD: u32 = 16;

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

/// A transfer that has landed whole, from a peer whose link is up, and fits the layout. Its header is the link's
/// [`Link::landed`] until the slot is answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) rank: usize,
    pub(crate) slot: u16,
    pub(crate) received_ns: u64,
}

/// How long a call may still wait. It looks at the clock only once it has found nothing: most calls need not.
pub(crate) struct Patience {
    timeout: Duration,
    deadline: Option<Instant>,
}

impl Patience {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { timeout, deadline: None }
    }

    /// What is left; none once it is over.
    pub(crate) fn left(&mut self, clock: &Clock) -> Option<Duration> {
        let deadline = *self.deadline.get_or_insert_with(|| clock.after(self.timeout));
        let left = deadline.saturating_duration_since(clock.now());
        (!left.is_zero()).then_some(left)
    }
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
    /// Every peer is linked, as the last poll found; otherwise it has to be found out.
    pub(crate) is_linked: bool,
    /// No link has to be looked after: all there are are up, everything that was sent is posted, and nothing is being fenced.
    pub(crate) is_settled: bool,
    by_id: Vec<(LinkId, usize)>,
    fencing: Vec<Fencing>,
    /// The peers' payload areas, side by side (FFN side), where they can be placed.
    pub(crate) space: Option<Arc<AddressSpace>>,
    /// This side's send slots (attention side).
    pub(crate) outbox: Option<Region>,
    completions: Vec<Completion>,
    /// Polls since the scheduler was listened to.
    unheard: u32,
    pub(crate) arrivals: VecDeque<Arrival>,
    /// When the arrivals of this poll were seen; none came otherwise.
    pub(crate) arrived_ns: Option<u64>,
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
            is_linked: false,
            is_settled: true,
            by_id: Vec::new(),
            fencing: Vec::new(),
            space: None,
            outbox: None,
            completions: Vec::with_capacity(256),
            unheard: 0,
            arrivals: VecDeque::with_capacity(256),
            arrived_ns: None,
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

    /// Whether payloads are read and produced where they lie, in either side's memory.
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

    /// Whether waiting for completeness is over, one way or the other.
    pub(crate) fn completed(&self) -> Option<Result<(), MeshError>> {
        if self.complete {
            return Some(Ok(()));
        }
        self.scheduler_lost.as_ref().map(|reason| Err(MeshError::SchedulerLost(reason.clone())))
    }

    /// Sends a message of the application's to the scheduler.
    pub(crate) fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        self.control.send(FromMember { body: Some(body) }).map_err(|error| MeshError::SchedulerLost(error.to_string()))
    }

    /// Makes progress: fills `arrivals`, `ended` and `events`. What has arrived does not wait for what the scheduler may have to
    /// say, unless that has waited for long.
    pub(crate) fn poll(&mut self) -> Result<(), MeshError> {
        self.arrived_ns = None;
        let polled = self.endpoint.poll(&mut self.completions);
        self.unheard += 1;
        if self.completions.is_empty() || self.unheard >= UNHEARD {
            self.unheard = 0;
            while let Some(event) = self.control.poll() {
                self.handle_control_event(event)?;
            }
        }
        self.handle_completions();
        polled?;
        if !self.is_settled {
            self.tend_links();
        }
        Ok(())
    }

    fn handle_control_event(&mut self, event: ControlEvent) -> Result<(), MeshError> {
        match event {
            ControlEvent::Message(message) => message.body.map_or(Ok(()), |body| self.handle_control(body)),
            ControlEvent::Lost(reason) => {
                self.complete = false;
                self.scheduler_lost = Some(reason.clone());
                self.events.push_back(MeshEvent::SchedulerLost(reason));
                Ok(())
            }
        }
    }

    #[inline(never)]
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
        if self.rank.is_some() {
            return Err(MeshError::Refused("the scheduler broke the protocol: a second Welcome".into()));
        }
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
            self.outbox = Some(self.device.allocate_payload(bytes, access, None)?);
        } else if self.device.places_payloads() {
            self.space =
                Some(AddressSpace::reserve(self.options.layout.area_bytes(Direction::A2F)?.saturating_mul(peers))?);
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

    /// A message whose loss is the session's loss, which the next poll reports.
    fn say(&mut self, body: from_member::Body) {
        if let Err(error) = self.control.send(FromMember { body: Some(body) }) {
            tracing::debug!(%error, "a control message was not sent");
        }
    }

    fn say_down(&mut self, incarnation: u32, reason: String) {
        self.say(from_member::Body::LinkDown(control::LinkDown { incarnation, reason }));
    }

    fn handle_completions(&mut self) {
        for index in 0..self.completions.len() {
            let completion = &self.completions[index];
            let (Completion::Immediate { link, .. }
            | Completion::Connected { link }
            | Completion::Disconnected { link, .. }
            | Completion::Sent { link, .. }) = completion;
            let Some(&(_, rank)) = self.by_id.iter().find(|(id, _)| id == link) else { continue };
            match completion {
                &Completion::Immediate { immediate, .. } => self.handle_immediate(rank, immediate),
                Completion::Connected { .. } => {
                    if let Err(error) = self.grant(rank) {
                        self.fence(rank, error.to_string());
                    }
                }
                Completion::Disconnected { reason, .. } => {
                    let reason = reason.to_string();
                    self.fence(rank, reason);
                }
                // Failed work ends its link, which has a completion of its own.
                Completion::Sent { .. } => {}
            }
        }
        self.completions.clear();
    }

    fn handle_immediate(&mut self, rank: usize, bits: u32) {
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
            Ok(Some(slot)) => {
                let received_ns = *self.arrived_ns.get_or_insert_with(|| self.clock.now_ns());
                self.arrivals.push_back(Arrival { rank, slot, received_ns });
            }
            Ok(None) => {}
            Err(reason) => self.fence(rank, format!("the peer broke the protocol: {reason}")),
        }
    }

    /// Posts a transfer to one peer.
    pub(crate) fn send(&mut self, rank: usize, header: &mut Header) -> Result<(), MeshError> {
        let direction = self.sends();
        let Some(link) = self.links[rank].as_mut() else { return Ok(()) };
        let sent = link.send(self.endpoint.as_mut(), &self.options.layout, direction, header);
        self.is_settled &= !link.has_backlog();
        sent
    }

    /// Sleeps until something may have happened, at most until `deadline`.
    pub(crate) fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
        self.sleep_for(deadline.saturating_duration_since(self.clock.now()))
    }

    pub(crate) fn sleep_for(&mut self, timeout: Duration) -> Result<(), MeshError> {
        // The last poll may have been woken for the scheduler's word, too, and left it: nobody wakes this member for it again.
        if self.unheard > 0 {
            return Ok(());
        }
        let chore = if self.is_settled { Duration::from_millis(500) } else { Duration::from_millis(2) };
        Ok(self.endpoint.wait(timeout.min(chore))?)
    }
}

/// Counts an immediate; when it completes a slot's transfer, reads the header and checks all that a peer can get wrong.
fn accept(link: &mut Link, layout: &SlotLayout, direction: Direction, bits: u32) -> Result<Option<u16>, String> {
    let immediate = Immediate::decode(bits).map_err(|error| error.to_string())?;
    let counter = link.counter(immediate.slot);
    let counter = counter.ok_or_else(|| format!("slot {} of {}", immediate.slot, layout.microbatches()))?;
    match counter.count(immediate) {
        Counted::Partial => return Ok(None),
        Counted::Violation => return Err(format!("{immediate:?} is not the next of its slot")),
        Counted::Complete => {}
    }
    let (incarnation, source) = (link.incarnation, link.peer.rank);
    let header = link.read_header(immediate.slot)?;
    let same = header.incarnation == incarnation
        && header.slot == immediate.slot
        && header.sequence == immediate.sequence
        && u32::from(header.source) == source
        && header.flags.has(Flags::REPLY) == (direction == Direction::F2A);
    if !same {
        return Err(format!(
            "the header of slot {} says incarnation {}, slot {}, sequence {}, source {}",
            immediate.slot, header.incarnation, header.slot, header.sequence, header.source
        ));
    }
    layout.check(direction, header).map_err(|error| error.to_string())?;
    Ok(Some(immediate.slot))
}
