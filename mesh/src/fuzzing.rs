//! What the fuzz targets call: each is given what a member, a scheduler or a peer could have sent, panics if a promise is
//! broken, and says whether it was taken. No part of the API.

mod member;
mod scheduler;

pub use member::member;
pub use scheduler::scheduler;

use crate::{Direction, PartSpec, SlotLayout};
use stepmesh_proto::{Header, MAX_PARTS, Part};

/// Reads fields off the front; zeroes when there are none left.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        let count = self.0.len().min(N);
        field[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        field
    }

    fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    /// The next step of a script; none at its end.
    fn step(&mut self) -> Option<u8> {
        (!self.0.is_empty()).then(|| self.byte())
    }

    /// As many bytes as the next two say, or what there is.
    fn chunk(&mut self) -> &'a [u8] {
        let len = usize::from(u16::from_le_bytes(self.take()));
        let (chunk, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        chunk
    }
}

/// A layout, and a transfer's parts that claim to fit it. Taken if they do: then none reaches out of its place.
pub fn layout(bytes: &[u8]) -> bool {
    let mut input = Input(bytes);
    let microbatches = u16::from_le_bytes(input.take());
    let count = usize::from(input.byte() % (MAX_PARTS as u8 + 2));
    let specs: Vec<_> = (0..count).map(|_| PartSpec { row_bytes: input.u32(), max_rows: input.u32() }).collect();
    let Ok(layout) = SlotLayout::new(microbatches, specs.clone(), Vec::new()) else { return false };
    let _ = (layout.area_bytes(Direction::A2F), layout.member_bytes(true, usize::MAX), layout.describe());
    let used = usize::from(input.byte() % (MAX_PARTS as u8 + 1));
    let part = |_| Part { rows: input.u32(), row_bytes: input.u32(), offset: input.u32(), ..Part::default() };
    let parts: Vec<_> = (0..used).map(part).collect();
    let mut header = Header::default();
    assert!(header.set_parts(&parts).is_ok());
    let taken = layout.check(Direction::A2F, &header).is_ok();
    let mut placed = Header::default();
    for header in
        [taken.then_some(&header), layout.place(Direction::A2F, &parts, &mut placed).is_ok().then_some(&placed)]
            .into_iter()
            .flatten()
    {
        let mut end = 0;
        for (part, spec) in header.parts().iter().zip(&specs) {
            assert!(u64::from(part.offset) >= end, "parts overlap");
            end = u64::from(part.offset) + part.bytes();
            assert!(part.bytes() <= u64::from(spec.row_bytes) * u64::from(spec.max_rows));
        }
        assert!(end <= layout.slot_bytes(Direction::A2F) as u64 && header.parts().len() <= specs.len());
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz_inputs::check;

    #[test]
    fn layouts_and_parts_of_any_numbers() {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        let two = [&[3, 0, 2][..], &words(&[7168, 128, 12, 128]), &[2], &words(&[4, 7168, 0, 5, 12, 917_504])].concat();
        check("mesh_layout", &[two], layout);
    }
}
