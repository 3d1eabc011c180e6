//! The lanes on which bytes have moved lately. While an endpoint is polled without pause, it is quicker to try these
//! sockets than to ask for events and then to try the socket that an event names.

use crate::LinkId;

/// Lanes that are tried: with more, asking is quicker.
const MOST: usize = 2;
/// How many fruitless tries in a row make a lane a quiet one.
const PATIENCE: u32 = 512;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Lively {
    lanes: [Option<(LinkId, u8, u32)>; MOST],
}

impl Lively {
    pub(super) fn is_empty(&self) -> bool {
        self.lanes.iter().all(Option::is_none)
    }

    /// Those that are tried.
    pub(super) fn lanes(&self) -> impl Iterator<Item = (LinkId, u8)> + use<> {
        self.lanes.into_iter().flatten().map(|(link, lane, _)| (link, lane))
    }

    /// Hears how a turn of a lane went: whether bytes have moved. Says whether the lane is one of these.
    pub(super) fn note(&mut self, link: LinkId, lane: u8, moved: bool) -> bool {
        let known = self.lanes.iter_mut().find(|entry| matches!(entry, Some((a, b, _)) if (*a, *b) == (link, lane)));
        if let Some(entry) = known {
            return match entry {
                Some((_, _, fruitless)) if moved || *fruitless < PATIENCE => {
                    *fruitless = if moved { 0 } else { *fruitless + 1 };
                    true
                }
                _ => {
                    *entry = None;
                    false
                }
            };
        }
        let free = self.lanes.iter_mut().find(|entry| moved && entry.is_none());
        free.map(|free| *free = Some((link, lane, 0))).is_some()
    }

    /// Forgets the lanes of a link that is gone.
    pub(super) fn forget(&mut self, link: LinkId) {
        for entry in &mut self.lanes {
            entry.take_if(|(of, ..)| *of == link);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: LinkId = LinkId(3);

    #[test]
    fn a_lane_is_lively_while_bytes_move_and_for_a_while_after() {
        let mut lively = Lively::default();
        lively.note(LINK, 1, false);
        assert!(lively.is_empty());
        lively.note(LINK, 1, true);
        for _ in 0..PATIENCE {
            lively.note(LINK, 1, false);
        }
        assert_eq!(lively.lanes().collect::<Vec<_>>(), [(LINK, 1)]);
        lively.note(LINK, 1, false);
        assert!(lively.is_empty());
    }

    #[test]
    fn the_first_lanes_are_kept_and_those_of_a_link_that_ends_are_forgotten() {
        let mut lively = Lively::default();
        for lane in 0..4 {
            lively.note(LINK, lane, true);
        }
        assert_eq!(lively.lanes().collect::<Vec<_>>(), [(LINK, 0), (LINK, 1)]);
        lively.forget(LINK);
        assert!(lively.is_empty());
    }
}
