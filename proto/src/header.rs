//! The data-plane header: what a transfer says about itself, once, on lane 0.
//!
//! Fixed little-endian layout, 64 bytes and 24 more for each part (at most 8, so at most 256 in all):
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 2 | magic `"SM"` |
//! | 2 | 1 | wire version |
//! | 3 | 1 | number of parts |
//! | 4 | 2 | flags |
//! | 6 | 2 | slot |
//! | 8 | 4 | link incarnation |
//! | 12 | 2 | slot sequence |
//! | 14 | 2 | source rank |
//! | 16 | 4 | group |
//! | 20 | 4 | CRC-32C of the whole header with this field zero |
//! | 24 | 16 | opaque to the mesh, the application's |
//! | 40 | 24 | time stamps: posted 8, received 8, process 4, respond 4 |
//! | 64 | 24 each | parts: key 8, dtype 1, zero 3, rows 4, row bytes 4, offset 4 |

use crate::checksum::{CHECKSUM, crc32c_but_itself};
use std::fmt;
use thiserror::Error;

/// The layout's version; a peer of another version is refused.
pub const WIRE_VERSION: u8 = 1;
/// Bytes of a header without parts.
pub const HEADER_FIXED_BYTES: usize = 64;
/// Bytes that each part adds.
pub const PART_BYTES: usize = 24;
/// Parts that one transfer can carry.
pub const MAX_PARTS: usize = 8;
/// Bytes of the longest header.
pub const HEADER_MAX_BYTES: usize = HEADER_FIXED_BYTES + MAX_PARTS * PART_BYTES;

const MAGIC: [u8; 2] = *b"SM";
/// The group, and behind it the checksum.
const CHECKSUM_WORD: std::ops::Range<usize> = 16..24;

/// The element type of a part. The mesh moves bytes; the type is carried so that the receiver need not be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Dtype {
    /// Bytes without a type.
    #[default]
    Bytes = 0,
    /// IEEE single.
    F32 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// IEEE half.
    F16 = 3,
    /// FP8, four exponent and three mantissa bits, finite (`e4m3fn`).
    Fp8E4M3 = 4,
    /// FP8, five exponent and two mantissa bits.
    Fp8E5M2 = 5,
    /// Unsigned 8-bit integer.
    U8 = 6,
    /// Unsigned 16-bit integer.
    U16 = 7,
    /// Signed 32-bit integer.
    I32 = 8,
    /// Signed 64-bit integer.
    I64 = 9,
    /// Unsigned 32-bit integer.
    U32 = 10,
    /// IEEE double.
    F64 = 11,
    /// Signed 8-bit integer.
    I8 = 12,
    /// Signed 16-bit integer.
    I16 = 13,
    /// Boolean, one byte.
    Bool = 14,
}

impl Dtype {
    const ALL: [Self; 15] = [
        Self::Bytes,
        Self::F32,
        Self::Bf16,
        Self::F16,
        Self::Fp8E4M3,
        Self::Fp8E5M2,
        Self::U8,
        Self::U16,
        Self::I32,
        Self::I64,
        Self::U32,
        Self::F64,
        Self::I8,
        Self::I16,
        Self::Bool,
    ];

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bytes | Self::Fp8E4M3 | Self::Fp8E5M2 | Self::U8 | Self::I8 | Self::Bool => 1,
            Self::Bf16 | Self::F16 | Self::U16 | Self::I16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::I64 | Self::F64 => 8,
        }
    }
}

/// One tensor of a transfer: `[rows, row_bytes]` at `offset` in the slot's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Part {
    /// The application's name for it.
    pub key: u64,
    /// Element type.
    pub dtype: Dtype,
    /// Rows in use; zero is legal.
    pub rows: u32,
    /// Bytes of one row.
    pub row_bytes: u32,
    /// First byte in the slot's payload.
    pub offset: u32,
}

impl Part {
    /// Bytes in use.
    #[inline]
    pub fn bytes(&self) -> u64 {
        u64::from(self.rows) * u64::from(self.row_bytes)
    }
}

/// Bits that change how a transfer is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Flags(u16);

impl Flags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// An F2A reply; without it the transfer is an A2F request.
    pub const REPLY: Self = Self(1);
    /// The sender will not use this slot again until it has new work: arrival policies stop waiting for it.
    pub const LEAVE: Self = Self(1 << 1);
    /// The receiver could not process the request; the parts, if any, explain and are not a result.
    pub const FAILED: Self = Self(1 << 2);
    const KNOWN: u16 = 0b111;

    /// Both sets of flags.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every flag of `other` is set.
    #[inline]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Time stamps that travel in band. `posted_ns` is the sender's clock. A reply carries the FFN side's clock too:
/// `received_ns`, and from there the nanoseconds to the start of processing and to the start of the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Stamps {
    /// When the sender posted this transfer (sender's monotonic clock).
    pub posted_ns: u64,
    /// Reply only: when the FFN side saw the request complete (its clock).
    pub received_ns: u64,
    /// Reply only: from `received_ns` until `next_batch` handed the request out.
    pub process_ns: u32,
    /// Reply only: from `received_ns` until `respond` was called.
    pub respond_ns: u32,
}

/// A transfer's header. `parts()` are the ones in use.
#[derive(Clone, Copy, Default)]
pub struct Header {
    /// The link's incarnation; a header of another one is refused.
    pub incarnation: u32,
    /// The slot, which is the microbatch.
    pub slot: u16,
    /// The slot's transfer number, wrapping; equals the immediate's.
    pub sequence: u16,
    /// The sender's rank on its side.
    pub source: u16,
    /// Flags.
    pub flags: Flags,
    /// Transfers of equal slot and group may share a batch; the Step-3 pipeline puts the layer here.
    pub group: u32,
    /// Opaque to the mesh.
    pub app: [u8; 16],
    /// Time stamps.
    pub stamps: Stamps,
    part_count: u8,
    /// Those beyond `part_count` are whatever was there.
    parts: [Part; MAX_PARTS],
}

/// What two headers are compared by, and shown as.
#[derive(Debug, PartialEq)]
struct View<'a> {
    incarnation: u32,
    slot: u16,
    sequence: u16,
    source: u16,
    flags: Flags,
    group: u32,
    app: [u8; 16],
    stamps: Stamps,
    parts: &'a [Part],
}

impl PartialEq for Header {
    fn eq(&self, other: &Self) -> bool {
        self.view() == other.view()
    }
}

impl Eq for Header {}

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.view().fmt(f)
    }
}

/// Why bytes are not a header this build accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// The buffer ends before the header does.
    #[error("a header of {needed} bytes in a buffer of {given}")]
    Short {
        /// Bytes that the header needs.
        needed: usize,
        /// Bytes that there are.
        given: usize,
    },
    /// The first two bytes are not the protocol's.
    #[error("not a stepmesh header (magic {0:02x?})")]
    Magic([u8; 2]),
    /// The peer speaks another version.
    #[error("the peer speaks wire version {0}, this build speaks {WIRE_VERSION}: run the same release on both sides")]
    Version(u8),
    /// More than eight parts.
    #[error("{0} parts: a transfer carries at most {MAX_PARTS}")]
    Parts(usize),
    /// Flags that this version does not know.
    #[error("unknown flags {0:#06x}")]
    Flags(u16),
    /// An element type that this version does not know.
    #[error("part {part}: unknown element type {code}")]
    Dtype {
        /// The part's index.
        part: usize,
        /// The code on the wire.
        code: u8,
    },
    /// The checksum does not match: the header was torn or corrupted.
    #[error("checksum {found:08x}, expected {expected:08x}: the header is torn or corrupt")]
    Checksum {
        /// In the header.
        found: u32,
        /// Over the bytes.
        expected: u32,
    },
}

impl Header {
    fn view(&self) -> View<'_> {
        let Self { incarnation, slot, sequence, source, flags, group, app, stamps, .. } = *self;
        View { incarnation, slot, sequence, source, flags, group, app, stamps, parts: self.parts() }
    }

    /// The parts in use.
    #[inline]
    pub fn parts(&self) -> &[Part] {
        &self.parts[..usize::from(self.part_count)]
    }

    /// Replaces the parts.
    #[inline]
    pub fn set_parts(&mut self, parts: &[Part]) -> Result<(), HeaderError> {
        let room = self.parts.get_mut(..parts.len()).ok_or(HeaderError::Parts(parts.len()))?;
        for (room, part) in room.iter_mut().zip(parts) {
            *room = *part;
        }
        self.part_count = parts.len() as u8;
        Ok(())
    }

    /// The parts in use, to change.
    #[inline]
    pub fn parts_mut(&mut self) -> &mut [Part] {
        &mut self.parts[..usize::from(self.part_count)]
    }

    /// Leaves no part in use.
    #[inline]
    pub fn clear_parts(&mut self) {
        self.part_count = 0;
    }

    /// Bytes that [`Header::encode`] writes.
    #[inline]
    pub fn encoded_bytes(&self) -> usize {
        HEADER_FIXED_BYTES + usize::from(self.part_count) * PART_BYTES
    }

    /// Writes the header to the front of `out` and returns its length.
    ///
    /// By words, as the checksum and the copy to the peer read them, and inline, for fields that the caller has just set: a load
    /// that spans two stores waits for both.
    #[inline]
    pub fn encode(&self, out: &mut [u8; HEADER_MAX_BYTES]) -> usize {
        let bytes = self.encoded_bytes();
        let (fixed, parts) = out.split_at_mut(HEADER_FIXED_BYTES);
        let [a, b] = self.app.as_chunks::<8>().0 else { return 0 };
        let start = u64::from(u16::from_le_bytes(MAGIC))
            | u64::from(WIRE_VERSION) << 16
            | u64::from(self.part_count) << 24
            | u64::from(self.flags.0) << 32
            | u64::from(self.slot) << 48;
        let link = u64::from(self.incarnation) | u64::from(self.sequence) << 32 | u64::from(self.source) << 48;
        let group = u64::from(self.group);
        let stamps = &self.stamps;
        let spans = pair(stamps.process_ns, stamps.respond_ns);
        let [a, b] = [*a, *b].map(u64::from_le_bytes);
        let words = [start, link, group, a, b, stamps.posted_ns, stamps.received_ns, spans];
        for (out, word) in fixed.as_chunks_mut().0.iter_mut().zip(words) {
            *out = word.to_le_bytes();
        }
        for (part, out) in self.parts().iter().zip(parts.chunks_exact_mut(PART_BYTES)) {
            let words = [part.key, pair(part.dtype as u32, part.rows), pair(part.row_bytes, part.offset)];
            for (out, word) in out.as_chunks_mut().0.iter_mut().zip(words) {
                *out = word.to_le_bytes();
            }
        }
        let checksum = crc32c_but_itself(&out[..bytes]);
        out[CHECKSUM_WORD].copy_from_slice(&(group | u64::from(checksum) << 32).to_le_bytes());
        bytes
    }

    /// Reads a header from the front of `bytes`, which a hostile peer may have written. Only the header's own
    /// consistency is checked here; whether the parts fit their slot is the mesh's question.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let mut header = Self::default();
        header.read(bytes)?;
        Ok(header)
    }

    /// As [`Header::decode`], in place. After an error the header is worth nothing.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), HeaderError> {
        let short = |needed| HeaderError::Short { needed, given: bytes.len() };
        let fixed: &[u8; HEADER_FIXED_BYTES] = bytes.first_chunk().ok_or_else(|| short(HEADER_FIXED_BYTES))?;
        if fixed[0..2] != MAGIC {
            return Err(HeaderError::Magic([fixed[0], fixed[1]]));
        }
        if fixed[2] != WIRE_VERSION {
            return Err(HeaderError::Version(fixed[2]));
        }
        let part_count = fixed[3];
        let used = self.parts.get_mut(..usize::from(part_count));
        let used = used.ok_or_else(|| HeaderError::Parts(usize::from(part_count)))?;
        let length = HEADER_FIXED_BYTES + used.len() * PART_BYTES;
        let whole = bytes.get(..length).ok_or_else(|| short(length))?;
        let found = le_u32(fixed, CHECKSUM.start);
        let expected = crc32c_but_itself(whole);
        if found != expected {
            return Err(HeaderError::Checksum { found, expected });
        }
        let flags = le_u16(fixed, 4);
        if flags & !Flags::KNOWN != 0 {
            return Err(HeaderError::Flags(flags));
        }
        self.incarnation = le_u32(fixed, 8);
        self.slot = le_u16(fixed, 6);
        self.sequence = le_u16(fixed, 12);
        self.source = le_u16(fixed, 14);
        self.flags = Flags(flags);
        self.group = le_u32(fixed, 16);
        self.app.copy_from_slice(&fixed[24..40]);
        self.stamps = Stamps {
            posted_ns: le_u64(fixed, 40),
            received_ns: le_u64(fixed, 48),
            process_ns: le_u32(fixed, 56),
            respond_ns: le_u32(fixed, 60),
        };
        let raw_parts = whole[HEADER_FIXED_BYTES..].as_chunks::<PART_BYTES>().0;
        for (index, (part, raw)) in used.iter_mut().zip(raw_parts).enumerate() {
            *part = Part {
                key: le_u64(raw, 0),
                dtype: Dtype::from_code(raw[8]).ok_or(HeaderError::Dtype { part: index, code: raw[8] })?,
                rows: le_u32(raw, 12),
                row_bytes: le_u32(raw, 16),
                offset: le_u32(raw, 20),
            };
        }
        self.part_count = part_count;
        Ok(())
    }
}

/// Two fields that make one word, the first at the lower address.
fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

#[inline]
fn le_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[inline]
fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[inline]
fn le_u64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> Header {
        let mut header = Header {
            incarnation: 7,
            slot: 2,
            sequence: 65535,
            source: 11,
            flags: Flags::REPLY.with(Flags::LEAVE),
            group: 60,
            app: *b"layer, step, m..",
            stamps: Stamps { posted_ns: 1, received_ns: 2, process_ns: 3, respond_ns: 4 },
            ..Header::default()
        };
        let part = Part { key: 9, dtype: Dtype::Bf16, rows: 128, row_bytes: 14336, offset: 4096 };
        header.set_parts(&[part, Part { rows: 0, ..part }]).unwrap();
        header
    }

    fn encoded(header: &Header) -> Vec<u8> {
        let mut bytes = [0; HEADER_MAX_BYTES];
        let length = header.encode(&mut bytes);
        bytes[..length].to_vec()
    }

    #[test]
    fn a_header_survives_the_wire() {
        let header = example();
        let bytes = encoded(&header);
        assert_eq!(bytes.len(), 64 + 2 * 24);
        assert_eq!(Header::decode(&bytes), Ok(header));
    }

    #[test]
    fn the_longest_header_is_256_bytes() {
        let mut header = example();
        header.set_parts(&[Part::default(); MAX_PARTS]).unwrap();
        assert_eq!(encoded(&header).len(), 256);
        assert_eq!(header.set_parts(&[Part::default(); 9]), Err(HeaderError::Parts(9)));
    }

    #[test]
    fn the_layout_is_fixed() {
        let bytes = encoded(&example());
        assert_eq!(&bytes[..4], b"SM\x01\x02");
        assert_eq!(bytes[6..8], 2u16.to_le_bytes());
        assert_eq!(bytes[8..12], 7u32.to_le_bytes());
        assert_eq!(bytes[16..20], 60u32.to_le_bytes());
        assert_eq!(bytes[72], Dtype::Bf16 as u8);
    }

    #[test]
    fn a_peer_of_another_version_is_refused_by_number() {
        let mut bytes = encoded(&example());
        bytes[2] = 9;
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Version(9)));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = encoded(&example());
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit} went unnoticed");
        }
    }

    #[test]
    fn every_truncation_is_noticed() {
        let good = encoded(&example());
        for length in 0..good.len() {
            assert!(Header::decode(&good[..length]).is_err(), "length {length} went unnoticed");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Header::decode(&bytes).is_err());
        }
    }
}
