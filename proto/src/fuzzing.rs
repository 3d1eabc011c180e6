//! What the fuzz targets call: one function a parser. Each is given what a peer could have sent, panics if the parser
//! breaks a promise, and says whether it took the bytes. No part of the API.

use crate::{HEADER_FIXED_BYTES, HEADER_MAX_BYTES, Header, Immediate, MAX_PARTS, PART_BYTES};

/// A data-plane header, as it is and with its checksum put right.
pub fn header(bytes: &[u8]) -> bool {
    let mut repaired = bytes.to_vec();
    if let Some(&parts) = bytes.get(3) {
        let length = HEADER_FIXED_BYTES + usize::from(parts).min(MAX_PARTS) * PART_BYTES;
        if let Some(whole) = repaired.get_mut(..length) {
            whole[20..24].fill(0);
            let checksum = crc32c::crc32c(whole);
            whole[20..24].copy_from_slice(&checksum.to_le_bytes());
        }
    }
    let taken = [bytes, &repaired].map(|bytes| match Header::decode(bytes) {
        Ok(header) => {
            let mut again = [0; HEADER_MAX_BYTES];
            let length = header.encode(&mut again);
            assert_eq!(Header::decode(&again[..length]), Ok(header));
            assert!(header.parts().len() <= MAX_PARTS && length <= bytes.len());
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    });
    taken[0] || taken[1]
}

/// Immediates, four bytes each.
pub fn immediate(bytes: &[u8]) -> bool {
    let decoded = |bits: &[u8; 4]| {
        let bits = u32::from_le_bytes(*bits);
        Immediate::decode(bits).is_ok_and(|immediate| {
            assert_eq!(immediate.encode(), Ok(bits));
            assert!(immediate.lane < immediate.lanes && immediate.lanes <= crate::MAX_LANES);
            assert!(immediate.slot < crate::MAX_SLOTS);
            true
        })
    };
    bytes.as_chunks().0.iter().fold(false, |any, bits| decoded(bits) | any)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz_inputs::check;
    use crate::{Dtype, Flags, Part, Stamps};

    fn seed(flags: Flags, parts: usize) -> Vec<u8> {
        let mut header = Header::default();
        (header.incarnation, header.slot, header.sequence, header.source) = (7, 2, 9, 1);
        (header.flags, header.group, header.app) = (flags, 5, [3; 16]);
        header.stamps = Stamps { posted_ns: 1, received_ns: 2, process_ns: 3, respond_ns: 4 };
        let part =
            |index| Part { key: index, dtype: Dtype::Bf16, rows: 4, row_bytes: 256, offset: 1024 * index as u32 };
        header.set_parts(&(0..parts as u64).map(part).collect::<Vec<_>>()).unwrap();
        let mut bytes = [0; HEADER_MAX_BYTES];
        let length = header.encode(&mut bytes);
        bytes[..length].to_vec()
    }

    #[test]
    fn headers_of_any_bytes() {
        let seeds = [seed(Flags::NONE, 0), seed(Flags::REPLY, 3), seed(Flags::LEAVE, 8), seed(Flags::FAILED, 1)];
        check("header", &seeds, header);
    }

    #[test]
    fn immediates_of_any_bits() {
        let bits = Immediate { slot: 3, lanes: 4, lane: 2, sequence: 77 }.encode().unwrap();
        check("immediate", &[bits.to_le_bytes().to_vec()], immediate);
    }
}
