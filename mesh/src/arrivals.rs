//! Which requests make a batch: the FFN side's arrival policies. Pure; time comes in as an argument.
//!
//! A batch holds one (group, microbatch); the Step-3 pipeline's group is the layer. A rank is *active* on a microbatch
//! from its first request until it leaves or is lost, and *waiting* while a request of it has not been answered. An
//! active rank that is not waiting will come with its next request; it **can still reach** a group that lies beyond its
//! latest one. Policy `All` releases the oldest group that no such rank can still reach.
//!
//! That cannot deadlock, whatever the FFN instances see first: an instance that holds group `g` back waits for a rank
//! whose latest group is below `g`; if that rank in turn is held back by another instance, it is at a group below
//! `g`, waiting for a rank lower still, and so on down to a rank that nobody holds back.

use std::time::Duration;

/// When `next_batch` releases a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Policy {
    /// With every participant that can still reach the group.
    #[default]
    All,
    /// At once, with whoever is there.
    Any,
    /// When this many ranks are there, or nobody else can still reach the group.
    AtLeast(usize),
    /// As `All`, but no later than this after the group's first arrival.
    Deadline(Duration),
}

/// A released batch: its ranks in ascending order are in the list given to [`Arrivals::release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Released {
    pub(crate) slot: u16,
    pub(crate) group: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seat {
    active: bool,
    latest: u32,
    waiting: Option<Waiting>,
    /// Handed out in a batch and not yet answered.
    in_batch: bool,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    order: u64,
    since_ns: u64,
    leaves: bool,
}

/// The requests that have arrived and were not yet handed out, for all microbatches.
#[derive(Debug)]
pub(crate) struct Arrivals {
    ranks: usize,
    seats: Vec<Seat>,
    order: u64,
    waiting: usize,
}

impl Arrivals {
    pub(crate) fn new(slots: u16, ranks: usize) -> Self {
        Self { ranks, seats: vec![Seat::default(); usize::from(slots) * ranks], order: 0, waiting: 0 }
    }

    fn seats(&self, slot: u16) -> &[Seat] {
        let first = usize::from(slot) * self.ranks;
        &self.seats[first..first + self.ranks]
    }

    fn seat(&mut self, slot: u16, rank: usize) -> &mut Seat {
        &mut self.seats[usize::from(slot) * self.ranks + rank]
    }

    /// Whether this rank's slot is free, so that a request may land: the sender's credit.
    pub(crate) fn is_free(&self, slot: u16, rank: usize) -> bool {
        let seat = &self.seats(slot)[rank];
        seat.waiting.is_none() && !seat.in_batch
    }

    /// A request of `rank` has landed. With `leaves`, the rank will not be waited for after it.
    pub(crate) fn arrived(&mut self, slot: u16, rank: usize, group: u32, leaves: bool, now_ns: u64) {
        self.order += 1;
        let order = self.order;
        let seat = self.seat(slot, rank);
        seat.active = true;
        seat.latest = group;
        seat.waiting = Some(Waiting { order, since_ns: now_ns, leaves });
        self.waiting += 1;
    }

    /// The rank is not waited for on this microbatch until its next request.
    pub(crate) fn left(&mut self, slot: u16, rank: usize) {
        self.seat(slot, rank).active = false;
    }

    /// The request that was handed out has been answered.
    pub(crate) fn answered(&mut self, slot: u16, rank: usize) {
        self.seat(slot, rank).in_batch = false;
    }

    /// The rank is gone: nothing of it is waited for or handed out any more.
    pub(crate) fn lost(&mut self, rank: usize) {
        for slot in 0..self.seats.len() / self.ranks.max(1) {
            let seat = self.seat(slot as u16, rank);
            let waited = seat.waiting.is_some();
            *seat = Seat::default();
            self.waiting -= usize::from(waited);
        }
    }

    /// The ranks of `group` that wait on `slot`, and whether another rank can still reach it.
    fn reachable(&self, slot: u16, group: u32) -> bool {
        self.seats(slot).iter().any(|seat| seat.active && seat.waiting.is_none() && seat.latest < group)
    }

    fn members(&self, slot: u16, group: u32) -> usize {
        self.seats(slot).iter().filter(|seat| seat.waiting.is_some() && seat.latest == group).count()
    }

    fn is_ready(&self, slot: u16, group: u32, since_ns: u64, policy: Policy, now_ns: u64) -> bool {
        match policy {
            Policy::Any => true,
            Policy::All => !self.reachable(slot, group),
            Policy::AtLeast(count) => self.members(slot, group) >= count || !self.reachable(slot, group),
            Policy::Deadline(limit) => {
                !self.reachable(slot, group) || u128::from(now_ns.saturating_sub(since_ns)) >= limit.as_nanos()
            }
        }
    }

    /// Releases the oldest batch of a wanted slot that the policy allows, and puts its ranks into `ranks`, ascending.
    pub(crate) fn release(
        &mut self,
        policy: Policy,
        now_ns: u64,
        wanted: impl Fn(u16) -> bool,
        ranks: &mut Vec<usize>,
    ) -> Option<Released> {
        ranks.clear();
        if self.waiting == 0 {
            return None;
        }
        let mut oldest: Option<(u64, Released)> = None;
        for (slot, seats) in (0..).zip(self.seats.chunks(self.ranks.max(1))) {
            for seat in seats {
                let Some(waiting) = seat.waiting else { continue };
                if oldest.is_none_or(|(order, _)| waiting.order < order)
                    && wanted(slot)
                    && self.is_ready(slot, seat.latest, waiting.since_ns, policy, now_ns)
                {
                    oldest = Some((waiting.order, Released { slot, group: seat.latest }));
                }
            }
        }
        let (_, released) = oldest?;
        for rank in 0..self.ranks {
            let seat = self.seat(released.slot, rank);
            if seat.latest != released.group {
                continue;
            }
            if let Some(waiting) = seat.waiting.take() {
                seat.in_batch = true;
                seat.active = !waiting.leaves;
                ranks.push(rank);
            }
        }
        self.waiting -= ranks.len();
        Some(released)
    }

    /// Requests that have arrived so far.
    pub(crate) fn count(&self) -> u64 {
        self.order
    }

    /// Whether a request has arrived and was not handed out.
    pub(crate) fn is_waited_on(&self) -> bool {
        self.waiting > 0
    }

    /// When, with no further arrival, the policy will next release something; none if that needs an arrival.
    pub(crate) fn next_release_ns(&self, policy: Policy) -> Option<u64> {
        let Policy::Deadline(limit) = policy else { return None };
        self.seats
            .iter()
            .filter_map(|seat| seat.waiting)
            .map(|waiting| waiting.since_ns.saturating_add(saturated_ns(limit)))
            .min()
    }
}

fn saturated_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Room {
        arrivals: Arrivals,
        now_ns: u64,
    }

    impl Room {
        fn new(ranks: usize) -> Self {
            Self { arrivals: Arrivals::new(3, ranks), now_ns: 1_000_000 }
        }

        fn arrive(&mut self, slot: u16, rank: usize, group: u32) {
            self.arrivals.arrived(slot, rank, group, false, self.now_ns);
        }

        fn release(&mut self, policy: Policy) -> Option<(u16, u32, Vec<usize>)> {
            let mut ranks = Vec::new();
            let released = self.arrivals.release(policy, self.now_ns, |_| true, &mut ranks)?;
            Some((released.slot, released.group, ranks))
        }

        fn answer(&mut self, slot: u16, ranks: &[usize]) {
            for &rank in ranks {
                self.arrivals.answered(slot, rank);
            }
        }

        /// All ranks take part in layer 0 of microbatch 0 and are answered.
        fn warm_up(&mut self, ranks: usize) {
            for rank in 0..ranks {
                self.arrive(0, rank, 0);
            }
            let (_, _, released) = self.release(Policy::All).unwrap();
            self.answer(0, &released);
        }
    }

    #[test]
    fn all_waits_for_every_active_rank() {
        let mut room = Room::new(3);
        room.warm_up(3);
        room.arrive(0, 2, 1);
        room.arrive(0, 0, 1);
        assert_eq!(room.release(Policy::All), None);
        room.arrive(0, 1, 1);
        assert_eq!(room.release(Policy::All), Some((0, 1, vec![0, 1, 2])));
    }

    #[test]
    fn a_rank_that_never_came_or_left_is_not_waited_for() {
        let mut room = Room::new(3);
        room.warm_up(2);
        room.arrivals.left(0, 1);
        room.arrive(0, 0, 1);
        assert_eq!(room.release(Policy::All), Some((0, 1, vec![0])));
    }

    #[test]
    fn a_rank_that_leaves_with_a_request_is_answered_and_then_not_waited_for() {
        let mut room = Room::new(2);
        room.warm_up(2);
        room.arrivals.arrived(0, 1, 1, true, room.now_ns);
        room.arrive(0, 0, 1);
        assert_eq!(room.release(Policy::All), Some((0, 1, vec![0, 1])));
        room.answer(0, &[0, 1]);
        room.arrive(0, 0, 2);
        assert_eq!(room.release(Policy::All), Some((0, 2, vec![0])));
    }

    #[test]
    fn when_everyone_waits_at_another_layer_the_oldest_group_goes_first() {
        let mut room = Room::new(2);
        room.warm_up(2);
        room.arrive(0, 0, 5);
        room.arrive(0, 1, 2);
        assert_eq!(room.release(Policy::All), Some((0, 5, vec![0])));
        room.answer(0, &[0]);
        assert_eq!(room.release(Policy::All), Some((0, 2, vec![1])), "rank 0 is past layer 2");
    }

    #[test]
    fn a_group_is_held_for_a_rank_that_can_still_reach_it() {
        let mut room = Room::new(2);
        room.warm_up(2);
        room.arrive(0, 0, 5);
        assert_eq!(room.release(Policy::All), None, "rank 1 is at layer 0 and can reach 5");
        room.arrive(0, 1, 5);
        assert_eq!(room.release(Policy::All), Some((0, 5, vec![0, 1])));
    }

    #[test]
    fn any_at_least_and_deadline_release_early() {
        let mut room = Room::new(3);
        room.warm_up(3);
        room.arrive(0, 1, 1);
        assert_eq!(room.release(Policy::AtLeast(2)), None);
        assert_eq!(room.release(Policy::Deadline(Duration::from_millis(1))), None);
        assert_eq!(
            room.arrivals.next_release_ns(Policy::Deadline(Duration::from_millis(1))),
            Some(room.now_ns + 1_000_000)
        );
        room.arrive(0, 2, 1);
        assert_eq!(room.release(Policy::AtLeast(2)), Some((0, 1, vec![1, 2])));
        room.answer(0, &[1, 2]);
        room.arrive(0, 0, 1);
        room.now_ns += 1_000_000;
        assert_eq!(room.release(Policy::Deadline(Duration::from_millis(1))), Some((0, 1, vec![0])));
        room.answer(0, &[0]);
        room.arrive(0, 0, 7);
        assert_eq!(room.release(Policy::Any), Some((0, 7, vec![0])));
    }

    #[test]
    fn a_lost_rank_is_forgotten_with_its_requests() {
        let mut room = Room::new(2);
        room.warm_up(2);
        room.arrive(0, 0, 1);
        room.arrive(1, 1, 0);
        room.arrivals.lost(1);
        assert_eq!(room.release(Policy::All), Some((0, 1, vec![0])));
        assert_eq!(room.release(Policy::All), None);
        assert_eq!(room.arrivals.waiting, 0);
        assert!(room.arrivals.is_free(1, 1));
    }

    #[test]
    fn microbatches_do_not_wait_for_each_other() {
        let mut room = Room::new(2);
        room.warm_up(2);
        room.arrive(0, 0, 1);
        room.arrive(1, 0, 0);
        assert_eq!(room.release(Policy::All), Some((1, 0, vec![0])));
    }

    /// Several FFN instances under `All`, each seeing the arrivals in an order of its own; every rank walks through its
    /// layers and needs every instance's answer before the next one.
    fn run_ranks(ffn: usize, walks: &[Vec<u32>], mut pick: impl FnMut(usize) -> usize) -> bool {
        let mut rooms: Vec<Room> = (0..ffn).map(|_| Room::new(walks.len())).collect();
        let mut position = vec![0_usize; walks.len()];
        let mut missing = vec![ffn; walks.len()];
        let mut wire: Vec<(usize, usize)> =
            (0..walks.len()).flat_map(|rank| (0..ffn).map(move |instance| (instance, rank))).collect();
        let mut finished = 0;
        loop {
            let choices = wire.len() + ffn;
            let choice = pick(choices);
            if choice < wire.len() {
                let (instance, rank) = wire.swap_remove(choice);
                rooms[instance].arrive(0, rank, walks[rank][position[rank]]);
                continue;
            }
            let mut progressed = false;
            for offset in 0..ffn {
                let instance = (choice - wire.len() + offset) % ffn;
                let Some((slot, _, ranks)) = rooms[instance].release(Policy::All) else { continue };
                rooms[instance].answer(slot, &ranks);
                progressed = true;
                for rank in ranks {
                    missing[rank] -= 1;
                    if missing[rank] > 0 {
                        continue;
                    }
                    position[rank] += 1;
                    if position[rank] == walks[rank].len() {
                        finished += 1;
                        for room in &mut rooms {
                            room.arrivals.left(0, rank);
                        }
                    } else {
                        missing[rank] = ffn;
                        wire.extend((0..ffn).map(|instance| (instance, rank)));
                    }
                }
                break;
            }
            if finished == walks.len() {
                return true;
            }
            if !progressed && wire.is_empty() {
                return false;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn all_never_deadlocks_over_several_ffn_instances(
            ffn in 1_usize..4,
            walks in proptest::collection::vec(proptest::collection::vec(0_u32..6, 1..20), 1..5),
            seed: u64,
        ) {
            use rand::{Rng, SeedableRng};
            let mut random = rand::rngs::SmallRng::seed_from_u64(seed);
            prop_assert!(run_ranks(ffn, &walks, |choices| random.random_range(0..choices)));
        }
    }
}
