//! An attention instance's send slots: each is one buffer's at a time, from `acquire` until it is pushed or dropped.

use crate::MeshError;
use crate::attention::not_linked;
use crate::layout::{Direction, SlotLayout};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use stepmesh_transport::Region;

/// The send slots of an attention instance.
#[derive(Debug)]
pub(crate) struct SendSlots {
    layout: Arc<SlotLayout>,
    /// Their memory, once the instance is admitted.
    region: OnceLock<Region>,
    /// Which of them a buffer owns.
    filling: Box<[AtomicBool]>,
}

impl SendSlots {
    pub(crate) fn new(layout: Arc<SlotLayout>) -> Arc<Self> {
        let filling = (0..layout.microbatches()).map(|_| AtomicBool::new(false)).collect();
        Arc::new(Self { layout, region: OnceLock::new(), filling })
    }

    /// The instance was admitted; its slots lie here.
    pub(crate) fn settle(&self, region: Region) {
        let _ = self.region.set(region);
    }

    /// Whether a buffer owns the slot.
    pub(crate) fn is_filling(&self, slot: u16) -> bool {
        self.filling[usize::from(slot)].load(Ordering::Acquire)
    }

    /// The slot's only buffer until it is dropped, pushed or not; `WouldBlock` while there is another.
    pub(crate) fn claim(self: &Arc<Self>, slot: u16) -> Result<SendBuffer, MeshError> {
        if self.region.get().is_none() {
            return Err(not_linked(None));
        }
        // Only the mesh claims, on one thread at a time: no exchange is needed.
        let filling = &self.filling[usize::from(slot)];
        if filling.load(Ordering::Acquire) {
            return Err(MeshError::WouldBlock(slot));
        }
        filling.store(true, Ordering::Relaxed);
        Ok(SendBuffer { slot, slots: self.clone() })
    }
}

/// A microbatch's send slot, owned until pushed or dropped.
#[derive(Debug)]
pub struct SendBuffer {
    slot: u16,
    slots: Arc<SendSlots>,
}

impl SendBuffer {
    pub(crate) fn is_of(&self, slots: &Arc<SendSlots>) -> bool {
        Arc::ptr_eq(&self.slots, slots)
    }

    /// The microbatch.
    pub fn microbatch(&self) -> u16 {
        self.slot
    }

    /// The bytes of a part, as long as the layout allows; empty for a part that the layout does not have.
    pub fn part_mut(&mut self, part: usize) -> &mut [u8] {
        let Some((region, range)) = self.place(part) else { return &mut [] };
        // SAFETY: the slot is this buffer's alone: no transfer of it is under way (`acquire` checked), `filling` keeps a
        // second buffer from being made, and the slice borrows the buffer exclusively.
        unsafe { region.bytes_mut(range) }.unwrap_or_default()
    }

    /// Where a part lies, for what must outlive this buffer: the region keeps the memory in being, no more; who writes
    /// there after the push changes what is under way.
    pub fn part_place(&self, part: usize) -> Option<(Region, Range<usize>)> {
        self.place(part).map(|(region, range)| (region.clone(), range))
    }

    fn place(&self, part: usize) -> Option<(&Region, Range<usize>)> {
        Some((self.slots.region.get()?, self.slots.layout.part_range(Direction::A2F, self.slot, part)?))
    }
}

impl Drop for SendBuffer {
    fn drop(&mut self) {
        self.slots.filling[usize::from(self.slot)].store(false, Ordering::Release);
    }
}
