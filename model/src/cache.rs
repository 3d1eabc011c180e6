//! The key/value cache: pages of 16 tokens, handed to sequences and taken back.
//!
//! A page holds, for each layer, 16 rotated keys and 16 values of `head_dim` elements; all heads share them. A sequence
//! reserves all pages that it may need before its first token, so that no step can run out of memory half-way.

mod attend;

use crate::cuda::CudaCache;
use crate::kernel::{Scalar, Values};
use crate::stage::Row;
use crate::{Dtype, ModelConfig, ModelError};
use std::sync::Arc;
use stepmesh_transport::cuda::Context;

pub(crate) use attend::{AttendScratch, Query};

/// Tokens of one page.
pub const BLOCK_TOKENS: usize = 16;

/// A sequence's place in a [`KvCache`]. It goes stale when the sequence is freed, and is refused from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId {
    index: u32,
    generation: u32,
}

/// How full a cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheStats {
    /// Blocks of [`BLOCK_TOKENS`] tokens in the cache.
    pub blocks: usize,
    /// Blocks that no sequence holds.
    pub free_blocks: usize,
    /// Sequences that hold blocks.
    pub sequences: usize,
}

/// Where keys and values are.
#[derive(Debug)]
enum Store {
    Host(Values),
    Device(CudaCache),
}

/// Keys and values of all sequences of one attention instance.
#[derive(Debug)]
pub struct KvCache {
    layers: usize,
    head_dim: usize,
    context: usize,
    dtype: Dtype,
    blocks: usize,
    /// `[layers, blocks, key or value, BLOCK_TOKENS, head_dim]`.
    values: Store,
    free: Vec<u32>,
    sequences: Vec<Sequence>,
    vacant: Vec<u32>,
}

#[derive(Debug, Default)]
struct Sequence {
    generation: u32,
    /// Tokens reserved; zero marks a vacant entry.
    reserved: usize,
    blocks: Vec<u32>,
    /// Positions held, for each layer.
    held: Vec<usize>,
    /// The position that the batch being checked must go on with.
    next: Option<usize>,
}

impl KvCache {
    /// A cache for at least `tokens` tokens, rounded up to whole blocks, for `config`'s model in `dtype`.
    ///
    /// # Errors
    /// [`ModelError::CacheSize`] for no tokens, or more than there is address space or memory for.
    pub fn new(config: &ModelConfig, dtype: Dtype, tokens: usize) -> Result<Self, ModelError> {
        Self::with_store(config, dtype, tokens, |elements| {
            let values = match dtype.rounds() {
                true => zeroed(elements).map(Values::Bf16),
                false => zeroed(elements).map(Values::F32),
            };
            match values {
                Ok(values) => Ok(Some(Store::Host(values))),
                Err(_) => Ok(None),
            }
        })
    }

    /// As [`KvCache::new`], in a GPU's memory.
    pub(crate) fn on_gpu(
        config: &ModelConfig,
        dtype: Dtype,
        tokens: usize,
        gpu: &Arc<Context>,
    ) -> Result<Self, ModelError> {
        Self::with_store(config, dtype, tokens, |elements| {
            Ok(Some(Store::Device(CudaCache::allocate(gpu, elements * dtype.bytes())?)))
        })
    }

    fn with_store(
        config: &ModelConfig,
        dtype: Dtype,
        tokens: usize,
        store: impl FnOnce(usize) -> Result<Option<Store>, ModelError>,
    ) -> Result<Self, ModelError> {
        let bytes_per_token = config.kv_bytes_per_token(dtype);
        let wrong = |reason| ModelError::CacheSize { tokens, bytes_per_token, reason };
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        if blocks == 0 {
            return Err(wrong("it would hold nothing; give it room for a block of 16 tokens at least"));
        }
        let elements = blocks
            .checked_mul(BLOCK_TOKENS * config.num_layers * config.kv_elements_per_layer())
            .filter(|elements| elements.checked_mul(4).is_some_and(|bytes| bytes <= isize::MAX as usize))
            .filter(|_| u32::try_from(blocks).is_ok())
            .ok_or_else(|| wrong("that is more than can be addressed"))?;
        let values = store(elements)?.ok_or_else(|| wrong("there is not that much memory"))?;
        Ok(Self {
            layers: config.num_layers,
            head_dim: config.head_dim,
            context: config.context_length,
            dtype,
            blocks,
            values,
            free: (0..blocks as u32).rev().collect(),
            sequences: Vec::new(),
            vacant: Vec::new(),
        })
    }

    /// A cache of at most `bytes` bytes, rounded down to whole blocks.
    ///
    /// # Errors
    /// As [`KvCache::new`].
    pub fn with_bytes(config: &ModelConfig, dtype: Dtype, bytes: usize) -> Result<Self, ModelError> {
        let blocks = bytes / (config.kv_bytes_per_token(dtype) * BLOCK_TOKENS).max(1);
        Self::new(config, dtype, blocks * BLOCK_TOKENS)
    }

    /// Reserves room for a sequence of up to `tokens` tokens, prompt and answer together.
    ///
    /// # Errors
    /// [`ModelError::CacheFull`] where there is no room now; [`ModelError::SequenceLength`] where there never can be.
    pub fn reserve(&mut self, tokens: usize) -> Result<SequenceId, ModelError> {
        if tokens == 0 || tokens > self.context {
            return Err(ModelError::SequenceLength { tokens, context: self.context });
        }
        let needed = tokens.div_ceil(BLOCK_TOKENS);
        let Some(kept) = self.free.len().checked_sub(needed) else {
            return Err(ModelError::CacheFull {
                needed_blocks: needed,
                free_blocks: self.free.len(),
                total_blocks: self.blocks,
            });
        };
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.sequences.push(Sequence::default());
            self.sequences.len() as u32 - 1
        });
        let sequence = &mut self.sequences[index as usize];
        sequence.reserved = tokens;
        sequence.blocks.clear();
        sequence.blocks.extend(self.free.drain(kept..).rev());
        sequence.held.clear();
        sequence.held.resize(self.layers, 0);
        Ok(SequenceId { index, generation: sequence.generation })
    }

    /// Gives a sequence's blocks back.
    ///
    /// # Errors
    /// [`ModelError::UnknownSequence`] if it was freed before.
    pub fn free(&mut self, id: SequenceId) -> Result<(), ModelError> {
        let sequence = self.find_mut(id)?;
        sequence.generation = sequence.generation.wrapping_add(1);
        sequence.reserved = 0;
        let blocks = std::mem::take(&mut sequence.blocks);
        self.free.extend(blocks.iter().rev());
        self.vacant.push(id.index);
        Ok(())
    }

    /// How full the cache is.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            blocks: self.blocks,
            free_blocks: self.free.len(),
            sequences: self.sequences.len() - self.vacant.len(),
        }
    }

    /// Tokens that a sequence holds in every layer, so the position of its next token.
    ///
    /// # Errors
    /// [`ModelError::UnknownSequence`] if it was freed.
    pub fn len(&self, id: SequenceId) -> Result<usize, ModelError> {
        Ok(self.find(id)?.held.iter().copied().min().unwrap_or(0))
    }

    /// Bytes of one token over all layers.
    pub fn bytes_per_token(&self) -> usize {
        2 * self.head_dim * self.layers * self.dtype.bytes()
    }

    /// Bytes of the whole cache.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Store::Host(values) => values.bytes(),
            Store::Device(cache) => cache.bytes(),
        }
    }

    /// Refuses a model that the cache was not made for, and rows that do not continue their sequences in `layer`.
    pub(crate) fn check(
        &mut self,
        config: &ModelConfig,
        dtype: Dtype,
        on_device: bool,
        layer: usize,
        rows: &[Row],
    ) -> Result<(), ModelError> {
        if on_device != matches!(self.values, Store::Device(_)) {
            let place = |on_device| if on_device { "on a GPU" } else { "in host memory" }.to_owned();
            return Err(ModelError::CacheMismatch { found: place(!on_device), expected: place(on_device) });
        }
        if (self.layers, self.head_dim, self.dtype) != (config.num_layers, config.head_dim, dtype) {
            let words = |layers, head_dim, dtype| format!("{layers} layers of head dimension {head_dim} in {dtype}");
            return Err(ModelError::CacheMismatch {
                found: words(self.layers, self.head_dim, self.dtype),
                expected: words(config.num_layers, config.head_dim, dtype),
            });
        }
        for row in rows {
            self.find_mut(row.sequence)?.next = None;
        }
        for (row, &Row { sequence, position }) in rows.iter().enumerate() {
            let sequence = self.find_mut(sequence)?;
            let held = sequence.held.get(layer).copied().unwrap_or(0);
            let wrong = |reason| Err(ModelError::Position { row, position, reason });
            match sequence.next {
                _ if position >= sequence.reserved => {
                    return wrong(format!("is beyond the {} tokens reserved for its sequence", sequence.reserved));
                }
                None if position > held => {
                    return wrong(format!("leaves a gap; layer {layer} holds {held} tokens of its sequence"));
                }
                Some(next) if position != next => {
                    return wrong(format!("should be {next}, the one after its sequence's previous row"));
                }
                _ => sequence.next = Some(position + 1),
            }
        }
        Ok(())
    }

    /// Stores the key and value `[head_dim]` of a row that [`KvCache::check`] has passed.
    pub(crate) fn store(&mut self, layer: usize, row: Row, key: &[f32], value: &[f32]) {
        self.hold(layer, row);
        let sequence = &self.sequences[row.sequence.index as usize];
        let block = sequence.blocks[row.position / BLOCK_TOKENS];
        let keys = self.block_start(layer, block) + row.position % BLOCK_TOKENS * self.head_dim;
        let values = keys + BLOCK_TOKENS * self.head_dim;
        match &mut self.values {
            Store::Device(_) => {}
            Store::Host(Values::F32(stored)) => {
                copy(key, &mut stored[keys..][..self.head_dim]);
                copy(value, &mut stored[values..][..self.head_dim]);
            }
            Store::Host(Values::Bf16(stored)) => {
                copy(key, &mut stored[keys..][..self.head_dim]);
                copy(value, &mut stored[values..][..self.head_dim]);
            }
        }
    }

    /// Notes that `layer` holds a row that [`KvCache::check`] has passed, and none after it.
    pub(crate) fn hold(&mut self, layer: usize, row: Row) {
        self.sequences[row.sequence.index as usize].held[layer] = row.position + 1;
    }

    /// For measurements: says that a sequence holds so many tokens, whatever they are.
    ///
    /// # Errors
    /// [`ModelError::UnknownSequence`] if it was freed.
    #[doc(hidden)]
    pub fn assume_held(&mut self, id: SequenceId, tokens: usize) -> Result<(), ModelError> {
        self.find_mut(id)?.held.fill(tokens);
        Ok(())
    }

    /// The pages of the sequence of a row that [`KvCache::check`] has passed.
    pub(crate) fn table(&self, row: Row) -> &[u32] {
        &self.sequences[row.sequence.index as usize].blocks
    }

    /// The first of a layer's pages.
    pub(crate) fn first_page(&self, layer: usize) -> usize {
        layer * self.blocks
    }

    /// The pages, if they are on a device.
    pub(crate) fn on_device(&self) -> Option<&CudaCache> {
        match &self.values {
            Store::Host(_) => None,
            Store::Device(cache) => Some(cache),
        }
    }

    fn block_start(&self, layer: usize, block: u32) -> usize {
        (layer * self.blocks + block as usize) * 2 * BLOCK_TOKENS * self.head_dim
    }

    fn find(&self, id: SequenceId) -> Result<&Sequence, ModelError> {
        let sequence = self.sequences.get(id.index as usize).filter(|sequence| sequence.is(id));
        sequence.ok_or(ModelError::UnknownSequence)
    }

    fn find_mut(&mut self, id: SequenceId) -> Result<&mut Sequence, ModelError> {
        let sequence = self.sequences.get_mut(id.index as usize).filter(|sequence| sequence.is(id));
        sequence.ok_or(ModelError::UnknownSequence)
    }
}

impl Sequence {
    fn is(&self, id: SequenceId) -> bool {
        self.reserved > 0 && self.generation == id.generation
    }
}

fn copy<S: Scalar>(from: &[f32], to: &mut [S]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = S::from_f32(*from));
}

/// Zeros, with an error instead of an abort where memory does not suffice.
fn zeroed<S: Scalar>(elements: usize) -> Result<Vec<S>, std::collections::TryReserveError> {
    let mut values = Vec::new();
    values.try_reserve_exact(elements)?;
    values.resize(elements, S::default());
    Ok(values)
}
