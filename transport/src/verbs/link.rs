//! One link of an endpoint: its queue pairs, what it has granted, and where it is in its life.

use super::connection_manager::{ConnectionManager, Connections};
use super::control::{self, Control, Message};
use super::descriptor::{Contact, LinkHalf, control_tag};
use super::endpoint::Rail;
use super::lane::{self, Lane};
use super::memory::Grant;
use super::queue_pair::{PeerPort, QueuePair};
use crate::{Descriptor, Disconnect, LinkId, LinkSpec, Side, TransportError};
use std::time::{Duration, Instant};

/// The lane number in the ids of the control queue pair's completions.
pub(super) const CONTROL: u8 = u8::MAX;
/// The rail of all control queue pairs, which is lane 0's.
pub(super) const CONTROL_RAIL: usize = 0;

/// Where a link is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Opened,
    /// The queue pairs are connected here; whether they are at the peer is unknown.
    Connecting {
        deadline: Instant,
    },
    Connected,
    /// The lanes have failed, here or at the peer, and are being drained.
    Ending {
        deadline: Instant,
        reason: Disconnect,
        /// An access was refused, and the peer has not said so. A dying peer's memory may go before its queue pairs,
        /// and then its device refuses what it has granted.
        unconfirmed: bool,
    },
    Ended,
}

/// See the module. Fields drop in this order: no memory is withdrawn that a lane may still bring bytes to.
pub(super) struct Link {
    pub(super) lanes: Vec<Lane>,
    pub(super) grants: Vec<Grant>,
    pub(super) control: Option<Control>,
    /// How the queue pairs are connected, where the connection manager does it.
    pub(super) connections: Option<Connections>,
    pub(super) spec: LinkSpec,
    /// How many rails it uses: of an endpoint's, no more than there are lanes.
    rails: usize,
    pub(super) phase: Phase,
    /// The peer's half, once it is known.
    pub(super) peer: Option<LinkHalf>,
    /// When the peer was last known to be alive, and when it was asked.
    pub(super) heard: Instant,
    pub(super) asked: Option<Instant>,
    /// The peer was told why this side ends the link.
    has_spoken: bool,
}

impl Link {
    /// A link whose queue pairs exist and wait to be connected.
    pub(super) fn new(rails: &mut [Rail], id: LinkId, spec: LinkSpec) -> Result<Self, TransportError> {
        let mut link = Self {
            lanes: Vec::with_capacity(spec.lanes.into()),
            grants: Vec::new(),
            control: None,
            connections: None,
            spec,
            rails: rails.len().min(spec.lanes.into()),
            phase: Phase::Opened,
            peer: None,
            heard: Instant::now(),
            asked: None,
            has_spoken: false,
        };
        let made = link.make_pairs(rails, id);
        if made.is_err() {
            link.drop_lanes(rails);
            link.drop_control(rails);
        }
        made.map(|()| link)
    }

    fn make_pairs(&mut self, rails: &mut [Rail], id: LinkId) -> Result<(), TransportError> {
        self.control = Some(Control::new(&mut rails[CONTROL_RAIL], lane::id(id, CONTROL), control_tag(&self.spec))?);
        for number in 0..self.spec.lanes {
            self.lanes.push(Lane::new(&mut rails[self.rail_of(number)], id, number)?);
        }
        Ok(())
    }

    /// The rail of a lane.
    pub(super) fn rail_of(&self, lane: u8) -> usize {
        usize::from(lane) % self.rails
    }

    /// The rails that it uses, of its endpoint's.
    pub(super) fn rails<'a>(&self, all: &'a [Rail]) -> &'a [Rail] {
        &all[..self.rails]
    }

    /// Its descriptor.
    pub(super) fn describe(&self, rails: &[Rail], manager: Option<&ConnectionManager>) -> Option<Descriptor> {
        let port = |rail: &Rail| {
            let (port, reads) = (&rail.context.port, rail.context.limits.reads);
            PeerPort { lid: port.lid, gid: port.gid, mtu: port.mtu as u8, reads }
        };
        let contact = match (&self.connections, manager) {
            (Some(connections), Some(manager)) => {
                let addresses = manager.addresses()[..self.rails].to_vec();
                Contact::Listeners { nonce: connections.nonce, addresses }
            }
            _ => Contact::QueuePairs {
                ports: self.rails(rails).iter().map(port).collect(),
                control: self.control.as_ref()?.pair().half(),
                lanes: self.lanes.iter().map(|lane| lane.pair().half()).collect(),
            },
        };
        let half = LinkHalf { incarnation: self.spec.incarnation, lanes: self.spec.lanes, contact };
        Some(half.encode(&self.spec))
    }

    /// Connects the queue pairs to those of the peer's descriptor.
    pub(super) fn connect(&mut self) -> Result<(), TransportError> {
        let Some(Contact::QueuePairs { ports, control, lanes }) = self.peer.as_ref().map(|peer| &peer.contact) else {
            return Ok(());
        };
        for (number, (lane, &half)) in self.lanes.iter().zip(lanes).enumerate() {
            lane.pair().connect(&ports[number % ports.len()], half)?;
        }
        self.control.as_ref().map_or(Ok(()), |own| own.pair().connect(&ports[0], *control))
    }

    /// A queue pair: 0 is the control's, and from 1 the lanes'.
    pub(super) fn pair(&self, number: u8) -> Option<&QueuePair> {
        match number.checked_sub(1) {
            None => self.control.as_ref().map(Control::pair),
            Some(lane) => self.lanes.get(usize::from(lane)).map(Lane::pair),
        }
    }

    /// How long the peer may still take to connect.
    pub(super) fn time_left(&self, now: Instant) -> Duration {
        match self.phase {
            Phase::Connecting { deadline } => deadline.saturating_duration_since(now),
            _ => Duration::ZERO,
        }
    }

    /// Whether the peer may have heard of this end.
    pub(super) fn was_dialled(&self) -> bool {
        self.peer.is_some() && self.phase != Phase::Ended
    }

    /// Has its queue pairs connected by the connection manager, if there is one.
    pub(super) fn await_connections(&mut self, manager: Option<&mut ConnectionManager>) -> Result<(), TransportError> {
        let Some(manager) = manager else { return Ok(()) };
        if self.spec.side == Side::Passive {
            manager.listen()?;
        }
        self.connections = Some(Connections::new(self.spec.lanes)?);
        Ok(())
    }

    /// Whether there are connections to be made for it.
    pub(super) fn awaits_connections(&self) -> bool {
        self.connections.is_some() && matches!(self.phase, Phase::Opened | Phase::Connecting { .. })
    }

    /// Says the last word, once.
    pub(super) fn say(&mut self, last_word: Option<Message>) {
        if let (Some(message), Some(control), false) = (last_word, &mut self.control, self.has_spoken) {
            control.send(message);
            self.has_spoken = true;
        }
    }

    /// Begins to end it, at the latest by `deadline`.
    pub(super) fn end_by(&mut self, deadline: Instant, reason: Disconnect) {
        self.phase = Phase::Ending { deadline, reason, unconfirmed: false };
    }

    /// Whether it is to end, and why, if nothing has to be waited for any more.
    pub(super) fn verdict(&self, now: Instant) -> Option<Disconnect> {
        let Phase::Ending { deadline, reason, unconfirmed } = &self.phase else { return None };
        let speaks = self.control.as_ref().is_some_and(|control| !control.failed);
        if *unconfirmed && !speaks {
            return Some(Disconnect::PeerGone("its memory and its control queue pair are gone".into()));
        }
        let done = !unconfirmed && self.lanes.iter().all(Lane::is_drained);
        (done || now >= *deadline).then(|| reason.clone())
    }

    /// Destroys the lanes and withdraws the grants: from here on the peer reaches no memory.
    pub(super) fn drop_lanes(&mut self, rails: &mut [Rail]) {
        for number in 0..self.lanes.len() {
            let Rail { context, queue, .. } = &mut rails[number % self.rails];
            queue.retire(lane::completions(context));
        }
        self.lanes.clear();
        self.grants.clear();
        self.connections = None;
    }

    /// Destroys the control queue pair.
    pub(super) fn drop_control(&mut self, rails: &mut [Rail]) {
        if self.control.take().is_some() {
            rails[CONTROL_RAIL].queue.retire(control::COMPLETIONS);
        }
    }
}
