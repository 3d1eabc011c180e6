//! The frame header: its layout, and the pure parser of what a peer sends.
//!
//! Little-endian, 56 bytes: magic u16, opcode u8, lane u8, incarnation u32, key u64, offset u64, length u64,
//! immediate u32, flags u32 (1: acknowledge this), sequence u64, acknowledged u64. The payload of a write or of a read
//! response follows, a large one 128 bytes after its frame's begin: what lies between is padding, and nobody looks at it. Every frame
//! acknowledges: it tells how many of the other end's work requests have taken effect on its lane.

use std::fmt;
use thiserror::Error;

/// Bytes of a frame's header.
pub(super) const HEADER_BYTES: usize = 56;

/// A longer payload is a large one.
pub(super) const LARGE_BYTES: usize = 32 << 10;

/// Bytes before a large payload: its header's and its padding's.
///
/// The kernel begins a buffer with the frame. Where its bytes and the payload's lie alike, to 128 of them, it copies them in and out
/// nearly twice as fast between cores without a common cache (256 KiB there and back over loopback, bare sockets, Zen 5: 60 µs, behind
/// headers of 32, 48, 56 or 64 bytes 112).
pub(super) const LEAD_BYTES: usize = 128;

static PADDING: [u8; LEAD_BYTES - HEADER_BYTES] = [0; LEAD_BYTES - HEADER_BYTES];

/// What lies between a header and its payload of `len` bytes.
pub(super) fn padding(len: usize) -> &'static [u8] {
    if len > LARGE_BYTES { &PADDING } else { &[] }
}

const MAGIC: u16 = 0x4d53;
const ACKNOWLEDGED_AT: usize = 48;

/// What a frame asks for or tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opcode {
    /// Payload for `key` at `offset`.
    Write = 1,
    /// As `Write` (or without payload), then an immediate.
    WriteImmediate = 2,
    /// Asks for `length` bytes of `key` at `offset`.
    ReadRequest = 3,
    /// The bytes that the read of this `sequence` asked for.
    ReadResponse = 4,
    /// The last frame of a lane that is closed in good order.
    Bye = 5,
    /// The work `sequence` of `lane` asked for what was not granted; `immediate` says why.
    Refused = 6,
    /// Nothing but what every frame tells: what has taken effect.
    Acknowledge = 7,
}

/// A frame without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) opcode: Opcode,
    /// `Refused`: the lane of the refused work.
    pub(super) lane: u8,
    pub(super) incarnation: u32,
    pub(super) key: u64,
    pub(super) offset: u64,
    /// Bytes of payload, or bytes wanted by a read.
    pub(super) len: u64,
    pub(super) immediate: u32,
    /// Whether the sender waits to hear that the work has taken effect.
    pub(super) signalled: bool,
    /// Number of the work on its lane, in order of posting.
    pub(super) sequence: u64,
    /// How many of the receiver's work requests have taken effect.
    pub(super) acknowledged: u64,
}

/// Bytes that are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum FrameError {
    #[error("a frame begins with {0:#06x}")]
    Magic(u16),
    #[error("unknown opcode {0}")]
    Opcode(u8),
    #[error("unknown flags {0:#x}")]
    Flags(u32),
}

impl Header {
    /// A header that refers to no region.
    pub(super) fn plain(opcode: Opcode, incarnation: u32) -> Self {
        Self {
            opcode,
            lane: 0,
            incarnation,
            key: 0,
            offset: 0,
            len: 0,
            immediate: 0,
            signalled: false,
            sequence: 0,
            acknowledged: 0,
        }
    }

    /// As on the wire.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[2] = self.opcode as u8;
        bytes[3] = self.lane;
        bytes[4..8].copy_from_slice(&self.incarnation.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.key.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.len.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.immediate.to_le_bytes());
        bytes[36..40].copy_from_slice(&u32::from(self.signalled).to_le_bytes());
        bytes[40..48].copy_from_slice(&self.sequence.to_le_bytes());
        acknowledge(&mut bytes, self.acknowledged);
        bytes
    }

    /// The header at the start of `bytes`; `None` until all of it is there.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<Self>, FrameError> {
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let magic = u16::from_le_bytes(field(bytes, 0));
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let opcode = match bytes[2] {
            1 => Opcode::Write,
            2 => Opcode::WriteImmediate,
            3 => Opcode::ReadRequest,
            4 => Opcode::ReadResponse,
            5 => Opcode::Bye,
            6 => Opcode::Refused,
            7 => Opcode::Acknowledge,
            other => return Err(FrameError::Opcode(other)),
        };
        let flags = u32::from_le_bytes(field(bytes, 36));
        if flags > 1 {
            return Err(FrameError::Flags(flags));
        }
        Ok(Some(Self {
            opcode,
            lane: bytes[3],
            incarnation: u32::from_le_bytes(field(bytes, 4)),
            key: u64::from_le_bytes(field(bytes, 8)),
            offset: u64::from_le_bytes(field(bytes, 16)),
            len: u64::from_le_bytes(field(bytes, 24)),
            immediate: u32::from_le_bytes(field(bytes, 32)),
            signalled: flags == 1,
            sequence: u64::from_le_bytes(field(bytes, 40)),
            acknowledged: u64::from_le_bytes(field(bytes, ACKNOWLEDGED_AT)),
        }))
    }
}

/// Brings an encoded header up to date.
pub(super) fn acknowledge(header: &mut [u8; HEADER_BYTES], count: u64) {
    header[ACKNOWLEDGED_AT..].copy_from_slice(&count.to_le_bytes());
}

/// The `N` bytes at `at` of a buffer that is longer than that.
pub(super) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// Why an access was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The frame is of another incarnation.
    Incarnation = 1,
    /// The key is not granted on this link.
    Key = 2,
    /// The grant does not allow it.
    Right = 3,
    /// The range is not inside the region.
    Bounds = 4,
    /// A reason that this version does not know.
    Other = 0,
}

impl Refusal {
    /// From the wire.
    pub(super) fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Incarnation,
            2 => Self::Key,
            3 => Self::Right,
            4 => Self::Bounds,
            _ => Self::Other,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Incarnation => "the frame is of another incarnation",
            Self::Key => "the key is not granted on this link",
            Self::Right => "the region is granted without that right",
            Self::Bounds => "the range is outside the region",
            Self::Other => "an unknown reason",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn a_header_survives_the_wire(
            opcode in 1u8..=7, lane: u8, incarnation: u32, key: u64, offset: u64, len: u64, immediate: u32,
            signalled: bool, sequence: u64, acknowledged: u64,
        ) {
            let plain = Header::plain(Opcode::Write, incarnation);
            let mut bytes =
                Header { lane, key, offset, len, immediate, signalled, sequence, acknowledged, ..plain }.encode();
            bytes[2] = opcode;
            let header = Header::parse(&bytes).unwrap().unwrap();
            prop_assert_eq!(header.encode(), bytes);
        }

        #[test]
        fn any_bytes_are_parsed_without_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..96), honest: bool) {
            if honest && bytes.len() >= 3 {
                bytes[0..2].copy_from_slice(&MAGIC.to_le_bytes());
                bytes[2] %= 9;
            }
            if let Ok(Some(header)) = Header::parse(&bytes) {
                prop_assert_eq!(&header.encode()[..], &bytes[..HEADER_BYTES]);
            }
        }
    }

    #[test]
    fn a_header_is_awaited_until_it_is_whole() {
        let bytes = Header::plain(Opcode::Bye, 7).encode();
        assert_eq!(Header::parse(&bytes[..HEADER_BYTES - 1]), Ok(None));
        assert!(Header::parse(&bytes).unwrap().is_some());
    }
}
