//! The attention side's slots: which are free, which wait for whose reply, which have failed. Pure.

use crate::TicketFailure;

/// What `push_pull` returns and `wait` consumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    pub(crate) slot: u16,
    pub(crate) number: u64,
}

impl Ticket {
    /// The microbatch.
    pub fn microbatch(&self) -> u16 {
        self.slot
    }
}

/// Where a ticket stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TicketStatus {
    /// Replies are missing.
    Pending,
    /// All replies are here: take them.
    Ready,
    /// It will never be ready.
    Failed(TicketFailure),
    /// Consumed, or of an earlier transfer.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Free,
    InFlight,
    /// The caller is done with the ticket; the slot is free once no reply is missing.
    Consumed,
}

#[derive(Debug, Default)]
struct Slot {
    phase: Phase,
    number: u64,
    waiting: Vec<bool>,
    missing: usize,
    failure: Option<TicketFailure>,
    /// The caller need not ask for the ticket any more.
    given_up: bool,
}

impl Slot {
    /// Nobody will ask for the ticket any more, or need not.
    fn is_settled(&self) -> bool {
        self.phase != Phase::InFlight || self.given_up
    }

    fn is_of(&self, ticket: Ticket) -> bool {
        self.number == ticket.number && self.phase == Phase::InFlight
    }
}

/// All slots of one attention instance towards `peers` FFN instances.
#[derive(Debug)]
pub(crate) struct Tickets {
    slots: Vec<Slot>,
    peers: usize,
    next: u64,
    replies: u64,
}

impl Tickets {
    pub(crate) fn new(slots: u16, peers: usize) -> Self {
        let slot = || Slot { waiting: vec![false; peers], ..Slot::default() };
        Self { slots: (0..slots).map(|_| slot()).collect(), peers, next: 0, replies: 0 }
    }

    /// Whether a new transfer may use the slot.
    pub(crate) fn is_free(&self, slot: u16) -> bool {
        let slot = &self.slots[usize::from(slot)];
        slot.is_settled() && slot.missing == 0
    }

    pub(crate) fn peers(&self) -> usize {
        self.peers
    }

    /// A transfer starts; every peer's reply is missing. The slot must be free.
    pub(crate) fn begin(&mut self, index: u16) -> Ticket {
        self.next += 1;
        let slot = &mut self.slots[usize::from(index)];
        debug_assert!(slot.is_settled() && slot.missing == 0);
        slot.phase = Phase::InFlight;
        slot.number = self.next;
        (slot.failure, slot.given_up) = (None, false);
        slot.waiting.fill(true);
        slot.missing = slot.waiting.len();
        Ticket { slot: index, number: self.next }
    }

    /// As [`Tickets::begin`] for a transfer that nobody will wait for.
    pub(crate) fn begin_unattended(&mut self, index: u16) {
        self.begin(index);
        self.slots[usize::from(index)].phase = Phase::Consumed;
    }

    /// A peer's reply has landed. False if none was due: the peer broke the protocol.
    #[must_use]
    pub(crate) fn replied(&mut self, slot: u16, peer: usize, failure: Option<TicketFailure>) -> bool {
        let slot = &mut self.slots[usize::from(slot)];
        if !slot.waiting[peer] {
            return false;
        }
        slot.waiting[peer] = false;
        slot.missing -= 1;
        self.replies += 1;
        if failure.is_some() && slot.failure.is_none() {
            slot.failure = failure;
        }
        true
    }

    /// The link to a peer has ended: no reply of it is due any more.
    pub(crate) fn link_ended(&mut self, peer: usize, failure: &TicketFailure) {
        for slot in 0..self.slots.len() {
            let _ = self.replied(slot as u16, peer, Some(failure.clone()));
        }
    }

    /// Replies that have come, or never will, so far.
    pub(crate) fn replies(&self) -> u64 {
        self.replies
    }

    /// Whether any slot waits for this peer's reply.
    pub(crate) fn waits_for(&self, peer: usize) -> bool {
        self.slots.iter().any(|slot| slot.waiting[peer] && slot.failure.is_none())
    }

    /// Whether replies are missing, and all of them may still come.
    pub(crate) fn is_pending(&self, ticket: Ticket) -> bool {
        let slot = self.slots.get(usize::from(ticket.slot));
        slot.is_some_and(|slot| slot.is_of(ticket) && slot.missing > 0 && slot.failure.is_none())
    }

    pub(crate) fn status(&self, ticket: Ticket) -> TicketStatus {
        let Some(slot) = self.slots.get(usize::from(ticket.slot)) else { return TicketStatus::Unknown };
        if !slot.is_of(ticket) {
            return TicketStatus::Unknown;
        }
        match &slot.failure {
            Some(failure) => TicketStatus::Failed(failure.clone()),
            None if slot.missing == 0 => TicketStatus::Ready,
            None => TicketStatus::Pending,
        }
    }

    /// The caller is done with the ticket.
    pub(crate) fn consume(&mut self, ticket: Ticket) {
        let slot = &mut self.slots[usize::from(ticket.slot)];
        if slot.number == ticket.number {
            slot.phase = Phase::Consumed;
        }
    }

    /// Gives the ticket up: fails it if it is pending, and returns the peers whose replies may still come and must be fenced
    /// off.
    pub(crate) fn cancel(&mut self, ticket: Ticket) -> Vec<usize> {
        let is_pending = self.is_pending(ticket);
        let Some(slot) = self.slots.get_mut(usize::from(ticket.slot)).filter(|slot| slot.is_of(ticket)) else {
            return Vec::new();
        };
        slot.given_up = true;
        if !is_pending {
            return Vec::new();
        }
        slot.failure = Some(TicketFailure::Cancelled);
        (0..slot.waiting.len()).filter(|&peer| slot.waiting[peer]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_ready_when_every_peer_has_replied_once() {
        let mut tickets = Tickets::new(2, 2);
        let ticket = tickets.begin(1);
        assert!(tickets.replied(1, 0, None));
        assert_eq!(tickets.status(ticket), TicketStatus::Pending);
        assert!(!tickets.replied(1, 0, None), "a second reply is a violation");
        assert!(tickets.replied(1, 1, None));
        assert_eq!(tickets.status(ticket), TicketStatus::Ready);
        assert!(!tickets.is_free(1));
        tickets.consume(ticket);
        assert!(tickets.is_free(1));
        assert_eq!(tickets.status(ticket), TicketStatus::Unknown);
    }

    #[test]
    fn a_failed_ticket_keeps_its_slot_until_the_survivors_have_replied() {
        let mut tickets = Tickets::new(1, 2);
        let ticket = tickets.begin(0);
        tickets.link_ended(1, &TicketFailure::Cancelled);
        assert_eq!(tickets.status(ticket), TicketStatus::Failed(TicketFailure::Cancelled));
        tickets.consume(ticket);
        assert!(!tickets.is_free(0));
        assert!(tickets.replied(0, 0, None));
        assert!(tickets.is_free(0));
    }

    #[test]
    fn cancelling_names_the_peers_to_fence() {
        let mut tickets = Tickets::new(1, 3);
        let ticket = tickets.begin(0);
        assert!(tickets.replied(0, 1, None));
        assert_eq!(tickets.cancel(ticket), [0, 2]);
        assert!(!tickets.waits_for(0), "a cancelled ticket does not hold its link open");
        assert!(!tickets.is_free(0), "quarantined");
        for peer in [0, 2] {
            assert!(tickets.replied(0, peer, Some(TicketFailure::Cancelled)));
        }
        assert!(tickets.is_free(0), "a cancelled ticket need not be waited for");
        assert!(tickets.cancel(ticket).is_empty(), "cancelling twice does nothing");
    }

    #[test]
    fn a_reply_that_is_faster_than_cancelling_counts_and_need_not_be_taken() {
        let mut tickets = Tickets::new(1, 1);
        let ticket = tickets.begin(0);
        assert!(tickets.replied(0, 0, None));
        assert!(tickets.cancel(ticket).is_empty());
        assert_eq!(tickets.status(ticket), TicketStatus::Ready);
        assert!(tickets.is_free(0));
        let next = tickets.begin(0);
        assert!(tickets.cancel(ticket).is_empty(), "an earlier one");
        assert!(tickets.replied(0, 0, None));
        assert!(!tickets.is_free(0), "this one is to be taken");
        tickets.consume(next);
        assert!(tickets.is_free(0));
    }

    #[test]
    fn a_ticket_of_an_earlier_transfer_is_unknown() {
        let mut tickets = Tickets::new(1, 1);
        let old = tickets.begin(0);
        assert!(tickets.replied(0, 0, None));
        tickets.consume(old);
        let new = tickets.begin(0);
        assert_eq!(tickets.status(old), TicketStatus::Unknown);
        tickets.consume(old);
        assert_eq!(tickets.status(new), TicketStatus::Pending);
    }
}
