//! One endpoint's half of a link: what it is, whom it trusts, what it has granted and what is outstanding.

use super::network::EventKey;
use crate::{Access, LinkId, LinkSpec, Region, Side};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// A half of a link, in the whole fabric. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct HalfId {
    pub(super) endpoint: u32,
    pub(super) link: LinkId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Open,
    Connected,
    Ended,
}

pub(super) struct Half {
    pub(super) spec: LinkSpec,
    pub(super) state: State,
    /// Whom this half was told to connect to.
    pub(super) peer: Option<HalfId>,
    /// Who has proven to be of this link.
    pub(super) proven: Option<HalfId>,
    /// The event that gives up connecting.
    pub(super) deadline: Option<EventKey>,
    pub(super) grants: BTreeMap<u64, Grant>,
    pub(super) lanes: Vec<Lane>,
}

pub(super) struct Grant {
    pub(super) region: Region,
    pub(super) access: Access,
}

/// What this half sends on a lane: its own work, and the answers to its peer's.
pub(super) struct Lane {
    /// The signals of the work that is not answered yet, in order.
    pub(super) outstanding: VecDeque<Option<u64>>,
    pub(super) skew: Duration,
    /// When the last of its work arrives: nothing later arrives before.
    pub(super) work_until: Instant,
    /// When the last of its answers arrives.
    pub(super) answers_until: Instant,
    /// Nothing gets through any more.
    pub(super) lost: bool,
}

impl Half {
    pub(super) fn new(spec: LinkSpec, skews: impl Iterator<Item = Duration>, now: Instant) -> Self {
        let lane = |skew| Lane { outstanding: VecDeque::new(), skew, work_until: now, answers_until: now, lost: false };
        Self {
            spec,
            state: State::Open,
            peer: None,
            proven: None,
            deadline: None,
            grants: BTreeMap::new(),
            lanes: skews.map(lane).collect(),
        }
    }

    /// Whether the link stands, to this very peer.
    pub(super) fn is_connected_to(&self, peer: HalfId) -> bool {
        self.state == State::Connected && self.peer == Some(peer)
    }

    /// What the other half's spec has wrong, if anything.
    pub(super) fn objection(&self, other: &LinkSpec) -> Option<&'static str> {
        let sides =
            matches!((self.spec.side, other.side), (Side::Active, Side::Passive) | (Side::Passive, Side::Active));
        if self.spec.incarnation != other.incarnation {
            Some("the halves are of different incarnations")
        } else if self.spec.secret != other.secret {
            Some("the secret was not proven")
        } else if self.spec.lanes != other.lanes {
            Some("the halves have different numbers of lanes")
        } else if !sides {
            Some("both halves are on the same side")
        } else {
            None
        }
    }

    /// The region behind a key if this half lets its peer do this to it, or why not.
    pub(super) fn permitted(&self, key: u64, offset: u64, len: usize, access: Access) -> Result<&Region, String> {
        let grant = self.grants.get(&key).ok_or("the key was not granted over this link")?;
        if grant.access < access {
            return Err(format!("{access:?} of a region granted for {:?}", grant.access));
        }
        let end = offset.checked_add(len as u64).filter(|&end| end <= grant.region.len() as u64);
        match end {
            Some(_) => Ok(&grant.region),
            None => Err(format!("{len} bytes at {offset} of a region of {} bytes", grant.region.len())),
        }
    }

    /// When the last thing that this half has sent arrives.
    pub(super) fn quiet_at(&self) -> Option<Instant> {
        self.lanes.iter().map(|lane| lane.work_until.max(lane.answers_until)).max()
    }
}
