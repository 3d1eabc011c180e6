//! Who the peers are, and what happens to them.

use std::fmt;
use stepmesh_proto::control;

/// One of the two sides of a deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Holds the sequences; sends requests.
    Attention,
    /// Answers them.
    Ffn,
}

impl Role {
    /// The other side.
    pub fn other(self) -> Self {
        match self {
            Self::Attention => Self::Ffn,
            Self::Ffn => Self::Attention,
        }
    }

    /// As the control plane writes it.
    pub fn to_control(self) -> control::Role {
        match self {
            Self::Attention => control::Role::Attention,
            Self::Ffn => control::Role::Ffn,
        }
    }

    /// As the control plane writes it; none for the unspecified role.
    pub fn from_control(role: control::Role) -> Option<Self> {
        match role {
            control::Role::Attention => Some(Self::Attention),
            control::Role::Ffn => Some(Self::Ffn),
            control::Role::Unspecified => None,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attention => "attention",
            Self::Ffn => "ffn",
        })
    }
}

/// A member of the mesh, as the others know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Unique in the scheduler's life.
    pub member: u64,
    /// Its side.
    pub role: Role,
    /// Its rank on that side.
    pub rank: u32,
    /// Its name for people.
    pub name: String,
    /// Its process.
    pub pid: u64,
}

impl Peer {
    /// Reads the control plane's description; none without a role.
    pub fn from_control(peer: &control::Peer) -> Option<Self> {
        Some(Self {
            member: peer.member,
            role: Role::from_control(peer.role())?,
            rank: peer.rank,
            name: peer.name.clone(),
            pid: peer.pid,
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({}, pid {})", self.role, self.rank, self.name, self.pid)
    }
}

/// What a member learns besides the answers to its calls.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum MeshEvent {
    /// The scheduler admitted this member.
    Joined {
        /// Its rank.
        rank: u32,
        /// The membership's number.
        epoch: u64,
    },
    /// A link is up: transfers with this peer are possible.
    LinkUp(Peer),
    /// A link is down; a new one follows if the peer is still a member.
    LinkDown {
        /// The peer.
        peer: Peer,
        /// Why.
        reason: String,
    },
    /// A member is lost; its rank may be taken by another one.
    PeerLost {
        /// The member.
        peer: Peer,
        /// Why.
        reason: String,
    },
    /// A new membership.
    Epoch {
        /// Its number.
        epoch: u64,
        /// All ranks are held and all links are up.
        complete: bool,
    },
    /// The scheduler is gone; links live on until they break.
    SchedulerLost(String),
    /// A control message that is the application's: sequences, figures, barriers, draining.
    Control(control::to_member::Body),
}
