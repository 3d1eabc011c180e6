//! What the three-stage pipeline can reach, from the times of its stages.
//!
//! In the steady state an attention instance computes `M` microbatches a layer, one after the other; so does the FFN
//! side; and one microbatch cannot begin its next layer before attention, the wire both ways and the FFN are over. The
//! longest of the three bounds a layer: `max(M·A, M·F, A + wire + F)`. With `A = F = wire` and `M = 3` they are equal, and
//! the third microbatch hides the wire entirely.

use std::time::Duration;

/// The stages of one layer of one microbatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stages {
    /// Attention.
    pub attention: Duration,
    /// The FFN instance.
    pub ffn: Duration,
    /// A2F and F2A together.
    pub wire: Duration,
    /// Microbatches in flight.
    pub microbatches: u16,
    /// Layers of the model.
    pub layers: u32,
}

/// What software adds to the stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Overhead {
    /// To each microbatch on the busier side.
    pub per_microbatch: Duration,
    /// To one microbatch's way through a layer.
    pub per_round: Duration,
}

/// What bounds a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// The attention instance is never idle.
    Attention,
    /// The FFN instance is never idle.
    Ffn,
    /// Both wait for the wire: one more microbatch would hide it.
    Wire,
}

impl Stages {
    /// Time per output token if software took none.
    pub fn ideal(&self) -> Duration {
        self.predict(Overhead::default())
    }

    /// Time per output token.
    pub fn predict(&self, overhead: Overhead) -> Duration {
        let (_, layer) = self.slowest(overhead);
        layer * self.layers
    }

    /// What bounds a layer, the wire only if nothing else does.
    pub fn bound(&self) -> Bound {
        self.slowest(Overhead::default()).0
    }

    fn slowest(&self, overhead: Overhead) -> (Bound, Duration) {
        let all = |stage: Duration| (stage + overhead.per_microbatch) * u32::from(self.microbatches);
        let mut slowest = (Bound::Attention, all(self.attention));
        let others =
            [(Bound::Ffn, all(self.ffn)), (Bound::Wire, self.attention + self.wire + self.ffn + overhead.per_round)];
        for other in others {
            if other.1 > slowest.1 {
                slowest = other;
            }
        }
        slowest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(attention: u64, ffn: u64, wire: u64, microbatches: u16) -> Stages {
        let us = Duration::from_micros;
        Stages { attention: us(attention), ffn: us(ffn), wire: us(wire), microbatches, layers: 61 }
    }

    #[test]
    fn three_equal_stages_are_hidden_by_three_microbatches() {
        let equal = stages(272, 272, 272, 3);
        assert_eq!(equal.ideal(), Duration::from_micros(61 * 816));
        assert_eq!(equal.bound(), Bound::Attention);
        assert_eq!(stages(272, 272, 273, 3).bound(), Bound::Wire);
        assert_eq!(stages(272, 272, 272, 2).bound(), Bound::Wire, "two hide only a wire that takes no time");
        assert_eq!(stages(200, 272, 272, 3).bound(), Bound::Ffn);
    }

    #[test]
    fn software_adds_to_whatever_bounds() {
        let overhead = Overhead { per_microbatch: Duration::from_micros(2), per_round: Duration::from_micros(10) };
        assert_eq!(stages(272, 272, 0, 3).predict(overhead), Duration::from_micros(61 * 822));
        assert_eq!(stages(272, 272, 1000, 3).predict(overhead), Duration::from_micros(61 * 1554));
    }
}
