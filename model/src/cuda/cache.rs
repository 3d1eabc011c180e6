//! The key/value cache on a device, and where the rows of a batch stand in it.

use std::sync::Arc;

use stepmesh_transport::Region;
use stepmesh_transport::cuda::{Context, DeviceMemory, Span};

use super::gpu::RowPlaces;
use super::memory::{Arena, Staging};
use crate::ModelError;
use crate::cache::BLOCK_TOKENS;

/// Keys and values in device memory: `[layers, pages, key or value, 16, head_dim]`.
#[derive(Debug, Clone)]
pub struct CudaCache {
    pub(super) pages: Span,
}

impl CudaCache {
    pub(crate) fn allocate(context: &Arc<Context>, bytes: usize) -> Result<Self, ModelError> {
        let region = Region::new(DeviceMemory::allocate(context, bytes)?);
        Ok(Self { pages: Span::new(&region, 0..bytes)? })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pages.len()
    }
}

/// The rows of a batch on the device: their positions and their sequences' pages, which may change between two replays of what
/// was captured with them.
#[derive(Clone)]
pub struct Batch {
    pub(super) places: RowPlaces,
    rows: usize,
}

impl Batch {
    pub(super) fn new(arena: &mut Arena, rows: usize, pages_a_row: usize) -> Result<Self, ModelError> {
        let places =
            RowPlaces { positions: arena.take(rows * 4)?, tables: arena.take(rows * pages_a_row * 4)?, pages_a_row };
        Ok(Self { places, rows })
    }

    /// Where there is room for them.
    pub(super) fn of(places: RowPlaces, rows: usize) -> Self {
        Self { places, rows }
    }

    /// A batch of fewer rows, of sequences of up to `tokens` tokens, in the same memory.
    ///
    /// # Errors
    /// [`ModelError::Cuda`] if there is no room for so many.
    pub fn within(&self, rows: usize, tokens: usize) -> Result<Self, ModelError> {
        let pages_a_row = tokens.div_ceil(BLOCK_TOKENS);
        let places = RowPlaces {
            positions: self.places.positions.part(0..rows * 4)?,
            tables: self.places.tables.part(0..rows * pages_a_row * 4)?,
            pages_a_row,
        };
        Ok(Self { places, rows })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Of each row its position and its sequence's pages.
    pub(super) fn write<'a>(
        &self,
        staging: &Staging,
        rows: impl Iterator<Item = (usize, &'a [u32])> + Clone,
    ) -> Result<(), ModelError> {
        staging.upload(rows.clone().map(|(position, _)| position as u32), &self.places.positions)?;
        let most = self.places.pages_a_row;
        let table = |(_, pages): (usize, &'a [u32])| {
            pages.iter().copied().chain(std::iter::repeat(0)).take(most).collect::<Vec<_>>()
        };
        staging.upload(rows.flat_map(table), &self.places.tables)
    }
}
