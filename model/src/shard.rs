//! Which part of the FFN side one instance holds.

use std::ops::Range;

use crate::{ModelConfig, ModelError};

/// One of `count` FFN instances. Dense layers and shared experts are cut along the intermediate dimension, a part for
/// each instance. Routed experts are shared out whole among groups of `tensor` instances (*expert parallel*), and each
/// is cut among the instances of its group (*tensor parallel*): with `tensor = 1` experts stay whole, with
/// `tensor = count` every instance holds a part of each. Parts are contiguous, and their sizes differ by at most one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    index: usize,
    count: usize,
    tensor: usize,
}

impl Shard {
    /// The only shard: all of the FFN side.
    pub const WHOLE: Self = Self { index: 0, count: 1, tensor: 1 };

    /// Shard `index` of `count`, experts whole.
    ///
    /// # Errors
    /// [`ModelError::Shard`] unless `index < count`.
    pub fn new(index: usize, count: usize) -> Result<Self, ModelError> {
        Self::with_tensor_parallel(index, count, 1)
    }

    /// Shard `index` of `count`, each expert cut among `tensor` instances of consecutive numbers.
    ///
    /// # Errors
    /// [`ModelError::Shard`] unless `index < count`; [`ModelError::TensorParallel`] unless `tensor` divides `count`.
    pub fn with_tensor_parallel(index: usize, count: usize, tensor: usize) -> Result<Self, ModelError> {
        if index >= count {
            return Err(ModelError::Shard { index, count });
        }
        if tensor == 0 || !count.is_multiple_of(tensor) {
            return Err(ModelError::TensorParallel { tensor, count });
        }
        Ok(Self { index, count, tensor })
    }

    /// This shard's number, from 0.
    pub fn index(self) -> usize {
        self.index
    }

    /// The number of shards.
    pub fn count(self) -> usize {
        self.count
    }

    /// Instances that each routed expert is cut among.
    pub fn tensor_parallel(self) -> usize {
        self.tensor
    }

    /// The routed experts that this shard holds a part of; empty where there are more groups than experts.
    pub fn experts(self, config: &ModelConfig) -> Range<usize> {
        let group = Self { index: self.index / self.tensor, count: self.count / self.tensor, tensor: 1 };
        group.range_of(config.num_experts, 1)
    }

    /// How each of its routed experts is cut.
    pub(crate) fn of_expert(self) -> Self {
        Self { index: self.index % self.tensor, count: self.tensor, tensor: 1 }
    }

    /// This shard's part of `0..len`, cut at multiples of `block` only.
    pub(crate) fn range_of(self, len: usize, block: usize) -> Range<usize> {
        let blocks = len.div_ceil(block) as u128;
        let cut = |shard: usize| len.min((blocks * shard as u128 / self.count as u128) as usize * block);
        cut(self.index)..cut(self.index + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shards_cover_everything_once_and_evenly(len in 0usize..10_000, count in 1usize..100, block in 1usize..200) {
            let mut end = 0;
            for index in 0..count {
                let range = Shard::new(index, count).unwrap().range_of(len, block);
                prop_assert_eq!(range.start, end);
                prop_assert!(range.start.is_multiple_of(block) || range.is_empty());
                let (blocks, all) = (range.len().div_ceil(block), len.div_ceil(block));
                prop_assert!(blocks == all / count || blocks == all.div_ceil(count));
                end = range.end;
            }
            prop_assert_eq!(end, len);
        }

        #[test]
        fn every_part_of_every_expert_is_held_once(groups in 1usize..9, tensor in 1usize..5, width in 1usize..300) {
            let config = ModelConfig::from_json(include_str!("../../fixtures/step3-tiny/config.json"), "").unwrap();
            let mut held = vec![0; config.num_experts * width];
            for index in 0..groups * tensor {
                let shard = Shard::with_tensor_parallel(index, groups * tensor, tensor).unwrap();
                for expert in shard.experts(&config) {
                    for i in shard.of_expert().range_of(width, 1) {
                        held[expert * width + i] += 1;
                    }
                }
            }
            prop_assert!(held.iter().all(|times| *times == 1));
        }
    }

    #[test]
    fn shards_that_cannot_be_are_refused() {
        for (index, count) in [(3, 3), (0, 0)] {
            let error = Shard::new(index, count).unwrap_err().to_string();
            assert!(error.contains(&format!("shard {index} of {count} does not exist")), "{error}");
        }
        for tensor in [0, 3, 8] {
            let error = Shard::with_tensor_parallel(0, 4, tensor).unwrap_err().to_string();
            assert!(error.contains("4 FFN instances"), "{error}");
        }
    }
}
