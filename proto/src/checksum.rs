//! CRC-32C (Castagnoli) of headers. They are short: the CPU's instruction in a plain loop is several times as fast as what
//! is tuned for long messages.

use std::ops::Range;

/// Where a header has its checksum: the second half of its third word.
pub(crate) const CHECKSUM: Range<usize> = 20..24;

/// The checksum of a header of whole words, in which the place of the checksum counts as zero.
#[inline]
pub(crate) fn crc32c_but_itself(header: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the CPU was just asked.
        return unsafe { by_instruction(header) };
    }
    by_library(header)
}

fn by_library(header: &[u8]) -> u32 {
    let (before, after) = (&header[..CHECKSUM.start], &header[CHECKSUM.end..]);
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), after)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn by_instruction(header: &[u8]) -> u32 {
    use std::arch::x86_64::_mm_crc32_u64;
    let [first, second, third, words @ ..] = header.as_chunks::<8>().0 else { return by_library(header) };
    let start = u64::from(u32::MAX);
    let crc = _mm_crc32_u64(_mm_crc32_u64(start, u64::from_le_bytes(*first)), u64::from_le_bytes(*second));
    let crc = _mm_crc32_u64(crc, u64::from_le_bytes(*third) & u64::from(u32::MAX));
    !words.iter().fold(crc, |crc, word| _mm_crc32_u64(crc, u64::from_le_bytes(*word))) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_that_of_the_library_with_zeros_in_its_place(words in prop::collection::vec(any::<u64>(), 3..32)) {
            let mut header: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let found = crc32c_but_itself(&header);
            prop_assert_eq!(found, by_library(&header));
            header[CHECKSUM].fill(0);
            prop_assert_eq!(found, crc32c::crc32c(&header));
        }
    }
}
