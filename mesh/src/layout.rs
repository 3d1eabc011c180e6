//! What a slot looks like: where each part lies, how much memory a deployment's slots take.
//!
//! Slots are a structure of arrays. Part `p` of microbatch `m` is `[ranks, rows, row_bytes]`: its base is
//! `part_offset(m, p)` in the first rank's area, and every rank's area follows its predecessor's at a fixed stride.

use crate::MeshError;
use std::fmt::Write as _;
use std::ops::Range;
use stepmesh_proto::{HEADER_MAX_BYTES, Header, MAX_PARTS, MAX_SLOTS, Part};
use stepmesh_transport::round_to_page;

const PART_ALIGNMENT: usize = 256;

/// Room for one part of a transfer: at most `max_rows × row_bytes` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PartSpec {
    /// Bytes of the widest row.
    pub row_bytes: u32,
    /// Most rows.
    pub max_rows: u32,
}

impl PartSpec {
    fn bytes(self) -> u64 {
        u64::from(self.row_bytes) * u64::from(self.max_rows)
    }
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Attention to FFN: requests.
    A2F,
    /// FFN to attention: replies.
    F2A,
}

/// What every member of a deployment must agree on: microbatches, and the parts of a request and of a reply.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlotLayout {
    microbatches: u16,
    request: Plan,
    reply: Plan,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Plan {
    parts: Vec<PartSpec>,
    places: Vec<Place>,
    slot_bytes: usize,
}

/// Where a part lies in its slot: what every transfer is checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    offset: u32,
    bytes: u64,
}

impl Plan {
    fn new(direction: &str, parts: Vec<PartSpec>) -> Result<Self, MeshError> {
        if parts.len() > MAX_PARTS {
            return Err(MeshError::Layout(format!(
                "{direction}: {} parts, a transfer carries at most {MAX_PARTS}",
                parts.len()
            )));
        }
        let mut places = Vec::with_capacity(parts.len());
        let mut end = 0_usize;
        for (index, part) in parts.iter().enumerate() {
            places.push(Place { offset: end as u32, bytes: part.bytes() });
            let next = usize::try_from(part.bytes())
                .ok()
                .and_then(|bytes| end.checked_add(bytes)?.checked_next_multiple_of(PART_ALIGNMENT))
                .filter(|&next| next <= u32::MAX as usize);
            end = next.ok_or_else(|| {
                MeshError::Layout(format!(
                    "{direction}: part {index} of {} rows of {} bytes takes the slot beyond 4 GiB",
                    part.max_rows, part.row_bytes
                ))
            })?;
        }
        Ok(Self { parts, places, slot_bytes: end })
    }
}

impl Plan {
    /// What is wrong with parts that do not fit.
    #[cold]
    fn misfit(&self, direction: Direction, parts: &[Part]) -> MeshError {
        for (index, part) in parts.iter().enumerate() {
            let Some(Place { offset, bytes }) = self.places.get(index) else {
                let count = self.places.len();
                return MeshError::Transfer(format!(
                    "part {index} of a {direction:?} transfer: the layout has {count} parts"
                ));
            };
            if part.bytes() > *bytes || part.offset != *offset {
                let Part { key, rows, row_bytes, offset: at, .. } = part;
                return MeshError::Transfer(format!(
                    "part {index} (key {key}) of {rows} rows of {row_bytes} bytes at {at} does not fit its place of {bytes} \
                     bytes at {offset}"
                ));
            }
        }
        MeshError::Transfer("the parts do not fit".into())
    }
}

impl SlotLayout {
    /// Checks and lays out the slots of `microbatches` microbatches, whose requests and replies have these parts.
    pub fn new(microbatches: u16, request: Vec<PartSpec>, reply: Vec<PartSpec>) -> Result<Self, MeshError> {
        if microbatches == 0 || microbatches > MAX_SLOTS {
            return Err(MeshError::Layout(format!("{microbatches} microbatches: between 1 and {MAX_SLOTS}")));
        }
        Ok(Self { microbatches, request: Plan::new("request", request)?, reply: Plan::new("reply", reply)? })
    }

    /// Microbatches, each with one slot per peer and direction.
    pub fn microbatches(&self) -> u16 {
        self.microbatches
    }

    fn plan(&self, direction: Direction) -> &Plan {
        match direction {
            Direction::A2F => &self.request,
            Direction::F2A => &self.reply,
        }
    }

    /// The parts of a transfer in this direction.
    pub fn parts(&self, direction: Direction) -> &[PartSpec] {
        &self.plan(direction).parts
    }

    /// Bytes of one slot's payload.
    pub fn slot_bytes(&self, direction: Direction) -> usize {
        self.plan(direction).slot_bytes
    }

    /// First byte of a slot's payload in its area.
    pub fn slot_offset(&self, direction: Direction, slot: u16) -> usize {
        usize::from(slot) * self.slot_bytes(direction)
    }

    /// First byte of a part in its slot's payload.
    pub fn part_offset(&self, direction: Direction, part: usize) -> Option<usize> {
        self.plan(direction).places.get(part).map(|place| place.offset as usize)
    }

    /// Where a part lies in its area, as long as the layout allows.
    pub fn part_range(&self, direction: Direction, slot: u16, part: usize) -> Option<Range<usize>> {
        let plan = self.plan(direction);
        let place = plan.places.get(part)?;
        let start = self.slot_offset(direction, slot) + place.offset as usize;
        (slot < self.microbatches).then(|| start..start + place.bytes as usize)
    }

    /// Bytes of one peer's payload area, whole pages: the stride between ranks.
    pub fn area_bytes(&self, direction: Direction) -> Result<usize, MeshError> {
        let bytes = usize::from(self.microbatches).checked_mul(self.slot_bytes(direction));
        let bytes = bytes.ok_or_else(|| MeshError::Layout("the slots do not fit the address space".into()))?;
        round_to_page(bytes.max(1)).map_err(MeshError::from)
    }

    /// Bytes of one peer's headers, whole pages.
    pub fn headers_bytes(&self) -> usize {
        let bytes = usize::from(self.microbatches) * HEADER_MAX_BYTES;
        round_to_page(bytes).unwrap_or(bytes)
    }

    /// Bytes that a member registers: an attention instance has its own send slots and landing slots for the replies of
    /// `peers` FFN instances; an FFN instance has landing and send slots for each of `peers` attention instances.
    pub fn member_bytes(&self, attention_side: bool, peers: usize) -> Result<usize, MeshError> {
        let request = self.area_bytes(Direction::A2F)?;
        let reply = self.area_bytes(Direction::F2A)?;
        let per_peer = 2 * self.headers_bytes() + reply + if attention_side { 0 } else { request };
        let own = if attention_side { request } else { 0 };
        per_peer
            .checked_mul(peers)
            .and_then(|bytes| bytes.checked_add(own))
            .ok_or_else(|| MeshError::Layout(format!("the slots of {peers} peers do not fit the address space")))
    }

    /// Whether `part` of a transfer lies where the layout puts it and fits there.
    pub fn check(&self, direction: Direction, header: &Header) -> Result<(), MeshError> {
        let plan = self.plan(direction);
        let fits = |(part, place): (&Part, &Place)| part.bytes() <= place.bytes && part.offset == place.offset;
        if header.parts().len() <= plan.places.len() && header.parts().iter().zip(&plan.places).all(fits) {
            return Ok(());
        }
        Err(plan.misfit(direction, header.parts()))
    }

    /// Puts each part at its offset; refuses what does not fit.
    pub fn place(&self, direction: Direction, parts: &[Part], header: &mut Header) -> Result<(), MeshError> {
        let plan = self.plan(direction);
        header.set_parts(parts).map_err(|error| MeshError::Transfer(error.to_string()))?;
        let mut fits = parts.len() <= plan.places.len();
        for (part, place) in header.parts_mut().iter_mut().zip(&plan.places) {
            part.offset = place.offset;
            fits &= part.bytes() <= place.bytes;
        }
        if fits { Ok(()) } else { Err(plan.misfit(direction, header.parts())) }
    }

    /// One line that says it all; members of one deployment compare it.
    pub fn describe(&self) -> String {
        let mut line = format!("{} microbatches", self.microbatches);
        for (name, plan) in [("request", &self.request), ("reply", &self.reply)] {
            let _ = write!(line, "; {name}");
            for part in &plan.parts {
                let _ = write!(line, " {}x{}B", part.max_rows, part.row_bytes);
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(max_rows: u32, row_bytes: u32) -> PartSpec {
        PartSpec { row_bytes, max_rows }
    }

    fn layout() -> SlotLayout {
        SlotLayout::new(3, vec![spec(128, 7168), spec(128, 12)], vec![spec(128, 14336)]).unwrap()
    }

    #[test]
    fn parts_follow_each_other_aligned_and_slots_do_too() {
        let layout = layout();
        assert_eq!(layout.part_offset(Direction::A2F, 1), Some(128 * 7168));
        assert_eq!(layout.slot_bytes(Direction::A2F), 128 * 7168 + 1536);
        assert_eq!(layout.slot_offset(Direction::A2F, 2), 2 * (128 * 7168 + 1536));
        assert_eq!(layout.area_bytes(Direction::F2A).unwrap() % 4096, 0);
    }

    #[test]
    fn a_tensor_that_does_not_fit_its_slot_is_refused_by_name() {
        let mut header = Header::default();
        let part = Part { key: 77, rows: 129, row_bytes: 7168, ..Part::default() };
        let error = layout().place(Direction::A2F, &[part], &mut header).unwrap_err().to_string();
        assert!(error.contains("key 77") && error.contains("129 rows"), "{error}");
        let parts = [Part { rows: 1, row_bytes: 1, ..Part::default() }; 2];
        assert!(layout().place(Direction::F2A, &parts, &mut header).is_err(), "the reply has one part only");
    }

    #[test]
    fn fewer_and_wider_rows_are_legal_while_the_bytes_fit() {
        let mut header = Header::default();
        let part = Part { rows: 1, row_bytes: 128 * 7168, ..Part::default() };
        layout().place(Direction::A2F, &[part], &mut header).unwrap();
        let empty = Part { rows: 0, row_bytes: 7168, ..Part::default() };
        layout().place(Direction::A2F, &[empty], &mut header).unwrap();
    }

    #[test]
    fn impossible_layouts_are_refused() {
        assert!(SlotLayout::new(0, vec![], vec![]).is_err());
        assert!(SlotLayout::new(1025, vec![], vec![]).is_err());
        assert!(SlotLayout::new(1, vec![spec(1, 1); 9], vec![]).is_err());
        assert!(SlotLayout::new(1, vec![spec(u32::MAX, u32::MAX)], vec![]).is_err());
    }
}
