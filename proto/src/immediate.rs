//! The 32 bits that arrive with the write that closes a lane: which slot, how many lanes, which lane, which sequence.

use thiserror::Error;

/// Slots a peer can have: the immediate has 10 bits for them.
pub const MAX_SLOTS: u16 = 1 << 10;
/// Lanes a link can have: the immediate has 3 bits for them.
pub const MAX_LANES: u8 = 1 << 3;

/// What a lane's closing write-with-immediate says: `slot 10 bits | lanes − 1 3 | lane 3 | sequence 16`, from the
/// most significant bit down. The queue pair that delivers it names the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Immediate {
    /// The slot, which is the microbatch.
    pub slot: u16,
    /// Lanes that this transfer was striped over, 1 to 8.
    pub lanes: u8,
    /// The lane that reports, below `lanes`.
    pub lane: u8,
    /// The slot's transfer number, wrapping.
    pub sequence: u16,
}

/// Why an immediate cannot be encoded, or was not sent by a stepmesh peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ImmediateError {
    /// The slot does not fit its ten bits.
    #[error("slot {0} is out of range: an immediate has room for {MAX_SLOTS} slots")]
    Slot(u16),
    /// The number of lanes is zero or above eight.
    #[error("{0} lanes: a link has 1 to {MAX_LANES}")]
    Lanes(u8),
    /// The lane is not one of the transfer's lanes.
    #[error("lane {lane} of a transfer over {lanes} lanes")]
    Lane {
        /// The lane that reported.
        lane: u8,
        /// The lanes of the transfer.
        lanes: u8,
    },
}

impl Immediate {
    /// Packs the four fields.
    #[inline]
    pub fn encode(self) -> Result<u32, ImmediateError> {
        if self.slot >= MAX_SLOTS {
            return Err(ImmediateError::Slot(self.slot));
        }
        if self.lanes == 0 || self.lanes > MAX_LANES {
            return Err(ImmediateError::Lanes(self.lanes));
        }
        if self.lane >= self.lanes {
            return Err(ImmediateError::Lane { lane: self.lane, lanes: self.lanes });
        }
        Ok(u32::from(self.slot) << 22
            | u32::from(self.lanes - 1) << 19
            | u32::from(self.lane) << 16
            | u32::from(self.sequence))
    }

    /// Unpacks what a peer sent; only a lane outside its own transfer is impossible.
    #[inline]
    pub fn decode(bits: u32) -> Result<Self, ImmediateError> {
        let immediate = Self {
            slot: (bits >> 22) as u16,
            lanes: ((bits >> 19) & 7) as u8 + 1,
            lane: ((bits >> 16) & 7) as u8,
            sequence: bits as u16,
        };
        if immediate.lane >= immediate.lanes {
            return Err(ImmediateError::Lane { lane: immediate.lane, lanes: immediate.lanes });
        }
        Ok(immediate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_immediate_that_decodes_encodes_to_the_same_bits(bits: u32) {
            if let Ok(immediate) = Immediate::decode(bits) {
                prop_assert_eq!(immediate.encode(), Ok(bits));
            }
        }
    }

    #[test]
    fn the_layout_is_slot_lanes_lane_sequence() {
        let immediate = Immediate { slot: 1, lanes: 2, lane: 1, sequence: 3 };
        assert_eq!(immediate.encode(), Ok(1 << 22 | 1 << 19 | 1 << 16 | 3));
    }

    #[test]
    fn fields_that_do_not_fit_are_refused_by_name() {
        let good = Immediate { slot: 0, lanes: 1, lane: 0, sequence: 0 };
        assert_eq!(Immediate { slot: 1024, ..good }.encode(), Err(ImmediateError::Slot(1024)));
        assert_eq!(Immediate { lanes: 0, ..good }.encode(), Err(ImmediateError::Lanes(0)));
        assert_eq!(Immediate { lanes: 9, ..good }.encode(), Err(ImmediateError::Lanes(9)));
        assert_eq!(Immediate { lane: 1, ..good }.encode(), Err(ImmediateError::Lane { lane: 1, lanes: 1 }));
    }
}
