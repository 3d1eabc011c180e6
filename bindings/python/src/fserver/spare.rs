//! Two slots are used in turn, and the one that is next is made ready while there is nothing to do: a peer has read it, and what
//! is written there has to be taken from the peer's cache, line by line, which takes longer than the copy.

use crate::member::Place;

/// What more would not stay in a core's cache until it is used.
const MOST: usize = 32 << 10;

/// Where tensors were put, last and before that.
#[derive(Default)]
pub(super) struct Spare {
    last: Option<Place>,
    before: Option<Place>,
}

impl Spare {
    /// So many bytes have been put at a place, and are on their way.
    pub(super) fn used(&mut self, place: Option<Place>, bytes: usize) {
        let Some((region, range)) = place else { return };
        let place = (region, range.start..range.start + bytes.min(range.len()).min(MOST));
        self.before = self.last.replace(place).filter(|(_, before)| Some(before.start) != self.start());
    }

    fn start(&self) -> Option<usize> {
        self.last.as_ref().map(|(_, range)| range.start)
    }

    /// There is nothing to do.
    ///
    /// # Safety
    /// Neither the program nor a GPU writes to either place.
    pub(super) unsafe fn prepare(&mut self) {
        if let Some((region, range)) = self.before.take() {
            // SAFETY: by the contract; a peer does not write to what this process sends.
            unsafe { region.prepare_write(range) };
        }
    }
}
