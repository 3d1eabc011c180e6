//! What happens between a transfer's last immediate and its batch or reply, by itself, for whoever measures it.

use crate::Policy;
use crate::arrivals::Arrivals;
use crate::counter::{Counted, ImmediateCounter};
use crate::tickets::{TicketStatus, Tickets};
use stepmesh_proto::Immediate;

/// One slot that goes round: a request of every rank lands and makes a batch, every reply lands and makes a ticket ready.
#[derive(Debug)]
pub struct Slot {
    lanes: u8,
    requests: Vec<ImmediateCounter>,
    arrivals: Arrivals,
    batch: Vec<usize>,
    replies: Vec<ImmediateCounter>,
    tickets: Tickets,
    sequence: u16,
}

impl Slot {
    /// For so many attention ranks and as many FFN ranks, whose transfers come on so many lanes.
    pub fn new(ranks: usize, lanes: u8) -> Self {
        Self {
            lanes,
            requests: vec![ImmediateCounter::default(); ranks],
            arrivals: Arrivals::new(1, ranks),
            batch: Vec::with_capacity(ranks),
            replies: vec![ImmediateCounter::default(); ranks],
            tickets: Tickets::new(1, ranks),
            sequence: 0,
        }
    }

    /// One round; whether the batch held every rank and the ticket was ready.
    pub fn round(&mut self) -> bool {
        self.sequence = self.sequence.wrapping_add(1);
        let (lanes, sequence) = (self.lanes, self.sequence);
        let landed = |counter: &mut ImmediateCounter| {
            let count = |lane| counter.count(Immediate { slot: 0, lanes, lane, sequence });
            (0..lanes).map(count).last() == Some(Counted::Complete)
        };
        let ticket = self.tickets.begin(0);
        for (rank, counter) in self.requests.iter_mut().enumerate() {
            if landed(counter) {
                self.arrivals.arrived(0, rank, u32::from(sequence), false, 0);
            }
        }
        let released = self.arrivals.release(Policy::All, 0, |_| true, &mut self.batch);
        self.batch.iter().for_each(|rank| self.arrivals.answered(0, *rank));
        for (rank, counter) in self.replies.iter_mut().enumerate() {
            if !landed(counter) || !self.tickets.replied(0, rank, None) {
                return false;
            }
        }
        let ready = self.tickets.status(ticket) == TicketStatus::Ready;
        self.tickets.consume(ticket);
        released.is_some() && ready && self.batch.len() == self.requests.len()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_round_makes_a_batch_and_a_reply() {
        let mut slot = super::Slot::new(3, 2);
        assert!((0..100_000).all(|_| slot.round()), "also when sequences wrap");
    }
}
