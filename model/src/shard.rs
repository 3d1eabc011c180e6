//! Which part of the FFN side one instance holds.

use std::ops::Range;

use crate::{ModelConfig, ModelError};

/// One of `count` FFN instances. Every dimension is cut into contiguous ranges whose sizes differ by at most one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Shard {
    /// The only shard: all of the FFN side.
    pub const WHOLE: Self = Self { index: 0, count: 1 };

    /// Shard `index` of `count`.
    ///
    /// # Errors
    /// [`ModelError::Shard`] unless `index < count`.
    pub fn new(index: usize, count: usize) -> Result<Self, ModelError> {
        if index < count { Ok(Self { index, count }) } else { Err(ModelError::Shard { index, count }) }
    }

    /// This shard's number, from 0.
    pub fn index(self) -> usize {
        self.index
    }

    /// The number of shards.
    pub fn count(self) -> usize {
        self.count
    }

    /// The routed experts that this shard holds; empty where there are more shards than experts.
    pub fn experts(self, config: &ModelConfig) -> Range<usize> {
        self.range(config.num_experts)
    }

    /// This shard's part of `0..len`.
    pub(crate) fn range(self, len: usize) -> Range<usize> {
        let cut = |shard: usize| (len as u128 * shard as u128 / self.count as u128) as usize;
        cut(self.index)..cut(self.index + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shards_cover_everything_once_and_evenly(len in 0usize..10_000, count in 1usize..100) {
            let mut end = 0;
            for index in 0..count {
                let range = Shard::new(index, count).unwrap().range(len);
                prop_assert_eq!(range.start, end);
                prop_assert!(range.len() == len / count || range.len() == len.div_ceil(count));
                end = range.end;
            }
            prop_assert_eq!(end, len);
        }
    }

    #[test]
    fn a_shard_beyond_the_count_is_refused() {
        for (index, count) in [(3, 3), (0, 0)] {
            let error = Shard::new(index, count).unwrap_err().to_string();
            assert!(error.contains(&format!("shard {index} of {count} does not exist")), "{error}");
        }
    }
}
