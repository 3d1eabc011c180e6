//! What the scheduler's state asks its driver to do.

use std::collections::VecDeque;
use std::fmt;
use stepmesh_proto::control::{
    Peer, Refused, Role, StatsReply, ToMember, sequence_event::Body as SequenceBody, to_member::Body,
};

/// One member's connection, from its opening to its end; never reused. A member's number is its session's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Session(pub(super) u64);

impl Session {
    /// The number that [`Peer`] and `Welcome` carry.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// One prompt being decoded; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub(super) u64);

impl SequenceId {
    /// The number that `StartSequence` carries.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// One question for the attention instances' figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StatsId(pub(super) u64);

/// What the driver does next, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Queue a message for a member. One that has no room for it is lost: say so with
    /// [`State::disconnected`](super::State::disconnected).
    Send {
        /// To whom.
        session: Session,
        /// What.
        message: ToMember,
    },
    /// End the session once what was sent has been delivered. The state has forgotten it.
    End {
        /// Whose.
        session: Session,
        /// Why; the member was told.
        reason: String,
    },
    /// Pass an event on to the client of a sequence. `Finished` and `Failed` are the last.
    Deliver {
        /// Of which sequence.
        sequence: SequenceId,
        /// The event.
        event: SequenceBody,
    },
    /// Answer a question for figures.
    Answer {
        /// Which question.
        request: StatsId,
        /// The answer.
        reply: StatsReply,
    },
    /// Something an operator wants to know.
    Note(Event),
}

/// What an operator wants to know.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A member was admitted.
    Joined {
        /// Who.
        peer: Peer,
        /// The epoch that this began.
        epoch: u64,
    },
    /// A member left (`orderly`) or was lost.
    Gone {
        /// Who.
        peer: Peer,
        /// The epoch that this began.
        epoch: u64,
        /// Why.
        reason: String,
        /// Whether it said good-bye.
        orderly: bool,
    },
    /// A session ended without having become a member.
    TurnedAway {
        /// Whose.
        session: Session,
        /// Why.
        reason: String,
    },
    /// One end of a link is down, or it did not come up in time.
    LinkDown {
        /// Which.
        incarnation: u32,
        /// Why.
        reason: String,
    },
    /// A link cannot be opened now; it is tried again.
    LinkDelayed {
        /// Why.
        reason: String,
    },
    /// Every rank is held and every link up, or no longer.
    Complete {
        /// In which epoch.
        epoch: u64,
        /// Which of the two.
        complete: bool,
    },
}

impl Event {
    /// Whether the operator should look.
    pub fn is_warning(&self) -> bool {
        match self {
            Self::Joined { .. } | Self::Complete { complete: true, .. } | Self::Gone { orderly: true, .. } => false,
            Self::Gone { .. } | Self::TurnedAway { .. } | Self::LinkDown { .. } => true,
            Self::LinkDelayed { .. } | Self::Complete { .. } => true,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joined { peer, epoch } => write!(f, "{} joined; epoch {epoch}", describe(peer)),
            Self::Gone { peer, epoch, reason, orderly: true } => {
                write!(f, "{} left: {reason}; epoch {epoch}", describe(peer))
            }
            Self::Gone { peer, epoch, reason, .. } => {
                write!(f, "{} was lost: {reason}; epoch {epoch}", describe(peer))
            }
            Self::TurnedAway { session, reason } => write!(f, "session {} turned away: {reason}", session.0),
            Self::LinkDown { incarnation, reason } => write!(f, "link {incarnation} is down: {reason}"),
            Self::LinkDelayed { reason } => write!(f, "a link has to wait: {reason}"),
            Self::Complete { epoch, complete: true } => write!(f, "the deployment is complete; epoch {epoch}"),
            Self::Complete { epoch, .. } => write!(f, "the deployment is incomplete; epoch {epoch}"),
        }
    }
}

/// "attention rank 1 (name, pid 12)".
pub(super) fn describe(peer: &Peer) -> String {
    format!("{} rank {} ({}, pid {})", side(peer.role()), peer.rank, peer.name, peer.pid)
}

/// The side's name, for people.
pub(super) fn side(role: Role) -> &'static str {
    match role {
        Role::Attention => "attention",
        Role::Ffn => "FFN",
        Role::Unspecified => "no",
    }
}

/// The actions that the driver has not taken yet.
#[derive(Debug, Default)]
pub(super) struct Outbox(VecDeque<Action>);

impl Outbox {
    pub(super) fn send(&mut self, session: Session, body: Body) {
        self.0.push_back(Action::Send { session, message: ToMember { body: Some(body) } });
    }

    /// Tells the member why, then ends its session.
    pub(super) fn refuse(&mut self, session: Session, reason: String) {
        self.send(session, Body::Refused(Refused { reason: reason.clone() }));
        self.push(Action::End { session, reason });
    }

    pub(super) fn push(&mut self, action: Action) {
        self.0.push_back(action);
    }

    pub(super) fn note(&mut self, event: Event) {
        self.0.push_back(Action::Note(event));
    }

    pub(super) fn pop(&mut self) -> Option<Action> {
        self.0.pop_front()
    }
}

/// The sender broke the protocol; its session ends for this reason.
#[derive(Debug)]
pub(super) struct Violation(pub(super) String);

/// `Err` with the words of a violation.
pub(super) fn violation<T>(reason: impl Into<String>) -> Result<T, Violation> {
    Err(Violation(reason.into()))
}

/// At most the first `bytes` of what a member wrote, cut between characters.
pub(super) fn clip(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}
