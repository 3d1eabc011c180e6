//! CRC-32C (Castagnoli) of headers. They are short: the CPU's instruction in a plain loop is several times as fast as what
//! is tuned for long messages.

/// The checksum of what `checksum` is that of, followed by `bytes`; that of nothing is 0.
#[inline]
pub(crate) fn crc32c(checksum: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the CPU was just asked.
        return unsafe { by_instruction(checksum, bytes) };
    }
    crc32c::crc32c_append(checksum, bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn by_instruction(checksum: u32, bytes: &[u8]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u64};
    let (words, rest) = bytes.as_chunks::<8>();
    let start = u64::from(!checksum);
    let crc = words.iter().fold(start, |crc, word| _mm_crc32_u64(crc, u64::from_le_bytes(*word))) as u32;
    !rest.iter().fold(crc, |crc, byte| _mm_crc32_u8(crc, *byte))
}

#[cfg(test)]
mod tests {
    use super::crc32c;
    use proptest::prelude::*;

    #[test]
    fn the_check_value_of_the_standard() {
        assert_eq!(crc32c(0, b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(0, b""), 0);
    }

    proptest! {
        #[test]
        fn in_any_pieces_it_is_that_of_the_library(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0..300usize) {
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            prop_assert_eq!(crc32c(crc32c(0, first), second), ::crc32c::crc32c(&bytes));
        }
    }
}
