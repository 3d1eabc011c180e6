//! What happens to a member besides the answers to its calls.

use std::collections::VecDeque;
use std::ffi::c_char;
use stepmesh_embed::answer;
use stepmesh_mesh::{MeshEvent, Peer, Role};
use stepmesh_proto::control::{from_member, to_member};

/// Events that are kept for the caller.
const KEPT: usize = 1024;
/// Bytes of an event's message, its end included.
pub const STEPMESH_MESSAGE_BYTES: usize = 256;

/// What an event is about.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepmeshEventKind {
    /// There is no event.
    None = 0,
    /// This member was admitted: rank, epoch.
    Joined = 1,
    /// The link to a peer is up: role, rank.
    LinkUp = 2,
    /// The link to a peer is down; a new one follows if the peer is still a member: role, rank, message.
    LinkDown = 3,
    /// A member is lost; its rank may be taken by another one: role, rank, message.
    PeerLost = 4,
    /// A new membership: epoch, complete.
    Epoch = 5,
    /// The scheduler is lost. Links live on until they break: message.
    SchedulerLost = 6,
    /// The scheduler shuts down: finish what is in flight, then close.
    Draining = 7,
}

/// An event. Fields that its kind does not name are zero.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepmeshEvent {
    /// A StepmeshEventKind.
    pub kind: u32,
    /// The peer's side: 1 attention, 2 FFN.
    pub role: u32,
    /// The peer's rank; this member's own if it has joined.
    pub rank: u32,
    /// Not zero: every rank is held and every link is up.
    pub complete: u32,
    /// The membership's number.
    pub epoch: u64,
    /// Words for people, terminated, cut off if too long.
    pub message: [c_char; STEPMESH_MESSAGE_BYTES],
}

impl StepmeshEvent {
    fn new(kind: StepmeshEventKind) -> Self {
        Self { kind: kind as u32, role: 0, rank: 0, complete: 0, epoch: 0, message: [0; STEPMESH_MESSAGE_BYTES] }
    }

    fn of(kind: StepmeshEventKind, peer: &Peer, reason: &str) -> Self {
        let role = match peer.role {
            Role::Attention => 1,
            Role::Ffn => 2,
        };
        Self { role, rank: peer.rank, ..Self::new(kind) }.saying(reason)
    }

    fn saying(mut self, text: &str) -> Self {
        let fits = (0..=text.len().min(STEPMESH_MESSAGE_BYTES - 1)).rev().find(|&length| text.is_char_boundary(length));
        for (to, from) in self.message.iter_mut().zip(&text.as_bytes()[..fits.unwrap_or(0)]) {
            *to = *from as c_char;
        }
        self
    }
}

/// The events that the caller has not taken yet.
#[derive(Default)]
pub(crate) struct Events(VecDeque<StepmeshEvent>);

impl Events {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn take(&mut self) -> StepmeshEvent {
        self.0.pop_front().unwrap_or_else(|| StepmeshEvent::new(StepmeshEventKind::None))
    }

    /// Keeps an event for the caller. What the scheduler asks a daemon for is answered here, for this member is none:
    /// the answer is returned.
    #[must_use]
    pub(crate) fn keep(&mut self, event: &MeshEvent) -> Option<from_member::Body> {
        use StepmeshEventKind as Kind;
        let event = match event {
            MeshEvent::Joined { rank, epoch } => {
                StepmeshEvent { rank: *rank, epoch: *epoch, ..StepmeshEvent::new(Kind::Joined) }
            }
            MeshEvent::LinkUp(peer) => StepmeshEvent::of(Kind::LinkUp, peer, ""),
            MeshEvent::LinkDown { peer, reason } => StepmeshEvent::of(Kind::LinkDown, peer, reason),
            MeshEvent::PeerLost { peer, reason } => StepmeshEvent::of(Kind::PeerLost, peer, reason),
            MeshEvent::Epoch { epoch, complete } => {
                StepmeshEvent { epoch: *epoch, complete: (*complete).into(), ..StepmeshEvent::new(Kind::Epoch) }
            }
            MeshEvent::SchedulerLost(reason) => StepmeshEvent::new(Kind::SchedulerLost).saying(reason),
            MeshEvent::Control(to_member::Body::Drain(_)) => StepmeshEvent::new(Kind::Draining),
            MeshEvent::Control(body) => return answer(body),
            _ => return None,
        };
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(event);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters_and_terminated() {
        let event = StepmeshEvent::new(StepmeshEventKind::SchedulerLost).saying(&"ü".repeat(200));
        assert_eq!(event.message.iter().filter(|byte| **byte != 0).count(), 254);
        assert_eq!(event.message[STEPMESH_MESSAGE_BYTES - 1], 0);
    }

    #[test]
    fn the_oldest_events_are_dropped_when_nobody_takes_them() {
        let mut events = Events::default();
        for epoch in 0..1500 {
            assert!(events.keep(&MeshEvent::Epoch { epoch, complete: false }).is_none());
        }
        assert_eq!(events.len(), KEPT);
        assert_eq!(events.take().epoch, 1500 - KEPT as u64);
    }
}
