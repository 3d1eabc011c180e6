//! Counts the immediates of one slot: which lanes of the transfer under way have reported.

use stepmesh_proto::Immediate;

/// What an immediate meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// Lanes are still missing.
    Partial,
    /// All lanes have reported: the slot's transfer has landed.
    Complete,
    /// The peer broke the protocol: another sequence than the next one, another number of lanes, or a lane twice.
    Violation,
}

/// The immediates of one (peer, slot, direction). Transfers are numbered from 1 on each incarnation of a link.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ImmediateCounter {
    completed: u16,
    lanes: u8,
    seen: u8,
}

impl ImmediateCounter {
    /// The number of the transfer that may come next.
    pub(crate) fn expected(&self) -> u16 {
        self.completed.wrapping_add(1)
    }

    /// Counts one lane's report.
    pub(crate) fn count(&mut self, immediate: Immediate) -> Counted {
        let bit = 1_u8 << immediate.lane;
        let first = self.seen == 0;
        if immediate.sequence != self.expected() || (!first && immediate.lanes != self.lanes) || self.seen & bit != 0 {
            return Counted::Violation;
        }
        self.lanes = immediate.lanes;
        self.seen |= bit;
        if self.seen.count_ones() < u32::from(self.lanes) {
            return Counted::Partial;
        }
        self.completed = immediate.sequence;
        self.seen = 0;
        Counted::Complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn immediate(lanes: u8, lane: u8, sequence: u16) -> Immediate {
        Immediate { slot: 0, lanes, lane, sequence }
    }

    #[test]
    fn a_transfer_is_complete_when_every_lane_has_reported_in_any_order() {
        let mut counter = ImmediateCounter::default();
        for lane in [2, 0] {
            assert_eq!(counter.count(immediate(3, lane, 1)), Counted::Partial);
        }
        assert_eq!(counter.count(immediate(3, 1, 1)), Counted::Complete);
        assert_eq!(counter.count(immediate(1, 0, 2)), Counted::Complete);
    }

    #[test]
    fn sequences_wrap() {
        let mut counter = ImmediateCounter { completed: u16::MAX, ..ImmediateCounter::default() };
        assert_eq!(counter.count(immediate(1, 0, 0)), Counted::Complete);
        assert_eq!(counter.expected(), 1);
    }

    #[test]
    fn a_lane_twice_a_stale_sequence_and_a_changed_lane_count_are_violations() {
        let mut counter = ImmediateCounter::default();
        assert_eq!(counter.count(immediate(2, 0, 1)), Counted::Partial);
        assert_eq!(counter.count(immediate(2, 0, 1)), Counted::Violation);
        assert_eq!(counter.count(immediate(3, 1, 1)), Counted::Violation);
        assert_eq!(counter.count(immediate(2, 1, 2)), Counted::Violation);
        assert_eq!(counter.count(immediate(2, 1, 0)), Counted::Violation);
        assert_eq!(counter.count(immediate(2, 1, 1)), Counted::Complete);
    }
}

/// The counter itself is one thread's. What others write are the lanes: a payload, and the flag behind it by which the
/// immediate arrives.
#[cfg(all(test, stepmesh_loom))]
mod model {
    use super::*;
    use crate::sync::{AtomicBool, Ordering};
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;

    struct Lane {
        payload: UnsafeCell<u32>,
        arrived: AtomicBool,
    }

    #[test]
    fn a_transfer_that_is_complete_has_all_its_stripes_whatever_the_order_of_its_lanes() {
        loom::model(|| {
            let lane = |_| Lane { payload: UnsafeCell::new(0), arrived: AtomicBool::new(false) };
            let lanes = Arc::new([0, 1].map(lane));
            let writers = [0, 1].map(|index: usize| {
                let lanes = lanes.clone();
                loom::thread::spawn(move || {
                    // SAFETY: what loom checks.
                    lanes[index].payload.with_mut(|payload| unsafe { *payload = 7 });
                    lanes[index].arrived.store(true, Ordering::Release);
                })
            });
            let mut counter = ImmediateCounter::default();
            let mut taken = [false; 2];
            loop {
                let arrived = |&lane: &usize| !taken[lane] && lanes[lane].arrived.load(Ordering::Acquire);
                let Some(lane) = [0, 1].into_iter().find(arrived) else {
                    loom::thread::yield_now();
                    continue;
                };
                taken[lane] = true;
                let immediate = Immediate { slot: 0, lanes: 2, lane: lane as u8, sequence: 1 };
                match counter.count(immediate) {
                    Counted::Partial => {}
                    Counted::Complete => break,
                    Counted::Violation => panic!("{taken:?}"),
                }
            }
            for lane in lanes.iter() {
                // SAFETY: what loom checks.
                assert_eq!(lane.payload.with(|payload| unsafe { *payload }), 7);
            }
            writers.into_iter().for_each(|writer| writer.join().unwrap());
        });
    }
}
