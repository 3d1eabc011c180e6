//! What is sent: the paper's transfers (FP8 hidden states with their scales and their experts there, BF16 partial sums
//! back), or one tensor of plain bytes each way.

use crate::BenchError;
use crate::transfer::{HIDDEN, TOP_K};
use crate::transport::Mode;
use std::ops::Range;
use stepmesh_mesh::{PartSpec, SendBuffer, SlotLayout};
use stepmesh_proto::{Dtype, Part};
use stepmesh_transport::{copy_to_slot, page_bytes};

/// Elements that share a scale.
const SCALED: usize = 128;
/// Slots of each direction: the pipeline's three microbatches.
pub(super) const SLOTS: u16 = 3;

/// One transfer there and one back.
#[derive(Clone, Debug)]
pub(super) struct Payload {
    pub(super) batch: u32,
    request: Vec<Part>,
    reply: Vec<Part>,
}

impl Payload {
    /// Of one row of so many bytes there and back.
    pub(super) fn plain([a2f_bytes, f2a_bytes]: [u32; 2]) -> Self {
        let part = |key, row_bytes| vec![Part { key, dtype: Dtype::Bytes, rows: 1, row_bytes, offset: 0 }];
        Self { batch: 1, request: part(0, a2f_bytes), reply: part(1, f2a_bytes) }
    }

    /// The paper's, of so many tokens.
    pub(super) fn new(batch: u32) -> Self {
        let part = |key, dtype: Dtype, elements: usize| {
            let row_bytes = (elements * dtype.bytes()) as u32;
            Part { key, dtype, rows: batch, row_bytes, offset: 0 }
        };
        let request = vec![
            part(0, Dtype::Fp8E4M3, HIDDEN),
            part(1, Dtype::F32, HIDDEN / SCALED),
            part(2, Dtype::U16, TOP_K as usize),
            part(3, Dtype::F32, TOP_K as usize),
        ];
        Self { batch, request, reply: vec![part(4, Dtype::Bf16, HIDDEN)] }
    }

    pub(super) fn request(&self) -> &[Part] {
        &self.request
    }

    pub(super) fn reply(&self) -> &[Part] {
        &self.reply
    }

    /// Bytes there and back.
    pub(super) fn bytes(&self) -> [usize; 2] {
        let bytes = |parts: &[Part]| parts.iter().map(|part| part.bytes() as usize).sum();
        [bytes(&self.request), bytes(&self.reply)]
    }

    pub(super) fn layout(&self, slots: u16) -> Result<SlotLayout, BenchError> {
        let specs = |parts: &[Part]| {
            parts.iter().map(|part| PartSpec { row_bytes: part.row_bytes, max_rows: part.rows.max(1) }).collect()
        };
        Ok(SlotLayout::new(slots, specs(&self.request), specs(&self.reply))?)
    }
}

/// The tensors of an attention instance, where its kernels would have left them: each begins at a page, as the floor's do.
pub(super) struct Tensors(Vec<(Vec<u8>, Range<usize>)>);

impl Tensors {
    pub(super) fn new(parts: &[Part], seed: u8) -> Self {
        let tensor = |part: &Part| {
            let len = part.bytes() as usize;
            let mut bytes = vec![0; len + page_bytes()];
            let start = bytes.as_ptr().align_offset(page_bytes());
            let place = start..start + len;
            bytes[place.clone()].iter_mut().enumerate().for_each(|(index, byte)| *byte = (index % 251) as u8 ^ seed);
            (bytes, place)
        };
        Self(parts.iter().map(tensor).collect())
    }

    pub(super) fn part(&self, part: usize) -> &[u8] {
        let (bytes, place) = &self.0[part];
        &bytes[place.clone()]
    }

    /// Copies them into a slot.
    pub(super) fn fill(&self, buffer: &mut SendBuffer) {
        for index in 0..self.0.len() {
            copy_to_slot(self.part(index), buffer.part_mut(index));
        }
    }

    /// Copies one of them.
    pub(super) fn copy_to(&self, part: usize, target: &mut [u8]) {
        copy_to_slot(self.part(part), target);
    }
}

/// What the application's bytes of a request ask of the FFN instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// A reply, produced in this way.
    Reply(Mode),
    /// The same, and to time the response.
    Timed(Mode),
    /// The request's own bytes, changed, over the whole reply.
    Echo,
}

impl Ask {
    pub(super) fn encode(self) -> [u8; 16] {
        let code = match self {
            Self::Reply(Mode::InPlace) => 0,
            Self::Reply(Mode::Copy) => 1,
            Self::Timed(Mode::InPlace) => 2,
            Self::Timed(Mode::Copy) => 3,
            Self::Echo => 4,
        };
        let mut app = [0; 16];
        app[0] = code;
        app
    }

    pub(super) fn decode(app: [u8; 16]) -> Self {
        match app[0] {
            0 => Self::Reply(Mode::InPlace),
            1 => Self::Reply(Mode::Copy),
            2 => Self::Timed(Mode::InPlace),
            3 => Self::Timed(Mode::Copy),
            _ => Self::Echo,
        }
    }
}

/// The echo's byte for a byte of the hidden state.
pub(super) fn echoed(byte: u8) -> u8 {
    byte.wrapping_mul(3).wrapping_add(1)
}
