//! Activations on the wire: rows of `f32` values as little-endian bytes, whole or as bf16.

use half::bf16;

use crate::ModelError;

/// The element type of activation rows between the sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WireDtype {
    /// 4 bytes an element; a round trip is exact.
    F32,
    /// 2 bytes an element, rounded half to even; a round trip is exact for values that bf16 can represent.
    Bf16,
}

impl WireDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Bytes of one row of `elements`.
    pub const fn row_bytes(self, elements: usize) -> usize {
        elements * self.bytes()
    }

    /// Writes `values` to `bytes`, which must be exactly as long as they need.
    ///
    /// # Errors
    /// [`ModelError::Length`], in bytes, before anything is written.
    pub fn encode(self, values: &[f32], bytes: &mut [u8]) -> Result<(), ModelError> {
        self.check("bytes", values.len(), bytes.len())?;
        match self {
            Self::F32 => {
                for (word, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *word = value.to_le_bytes();
                }
            }
            Self::Bf16 => {
                for (word, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *word = bf16::from_f32(*value).to_le_bytes();
                }
            }
        }
        Ok(())
    }

    /// Reads `bytes` into `values`, which must take them up exactly.
    ///
    /// # Errors
    /// [`ModelError::Length`], in bytes, before anything is written.
    pub fn decode(self, bytes: &[u8], values: &mut [f32]) -> Result<(), ModelError> {
        self.check("bytes", values.len(), bytes.len())?;
        match self {
            Self::F32 => {
                for (word, value) in bytes.as_chunks::<4>().0.iter().zip(values) {
                    *value = f32::from_le_bytes(*word);
                }
            }
            Self::Bf16 => {
                for (word, value) in bytes.as_chunks::<2>().0.iter().zip(values) {
                    *value = bf16::from_le_bytes(*word).to_f32();
                }
            }
        }
        Ok(())
    }

    fn check(self, argument: &'static str, elements: usize, found: usize) -> Result<(), ModelError> {
        let expected = self.row_bytes(elements);
        if found == expected { Ok(()) } else { Err(ModelError::Length { argument, found, expected }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn f32_rows_come_back_bit_for_bit(bits in prop::collection::vec(any::<u32>(), 0..200)) {
            let values: Vec<f32> = bits.iter().map(|bits| f32::from_bits(*bits)).collect();
            let mut bytes = vec![0; WireDtype::F32.row_bytes(values.len())];
            let mut back = vec![0.0; values.len()];
            WireDtype::F32.encode(&values, &mut bytes).unwrap();
            WireDtype::F32.decode(&bytes, &mut back).unwrap();
            prop_assert_eq!(bits, back.iter().map(|value| value.to_bits()).collect::<Vec<_>>());
        }

        #[test]
        fn bf16_rows_come_back_rounded_and_a_second_trip_is_exact(values in prop::collection::vec(-1e30f32..1e30, 0..200)) {
            let mut bytes = vec![0; WireDtype::Bf16.row_bytes(values.len())];
            let (mut once, mut twice) = (vec![0.0; values.len()], vec![0.0; values.len()]);
            WireDtype::Bf16.encode(&values, &mut bytes).unwrap();
            WireDtype::Bf16.decode(&bytes, &mut once).unwrap();
            for (value, back) in values.iter().zip(&once) {
                prop_assert!((value - back).abs() <= value.abs() / 256.0);
            }
            WireDtype::Bf16.encode(&once, &mut bytes).unwrap();
            WireDtype::Bf16.decode(&bytes, &mut twice).unwrap();
            prop_assert_eq!(once, twice);
        }

        #[test]
        fn a_buffer_of_another_length_is_refused(elements in 0usize..50, bytes in 0usize..250) {
            for dtype in [WireDtype::F32, WireDtype::Bf16] {
                let fits = bytes == dtype.row_bytes(elements);
                let (mut values, mut row) = (vec![0.0; elements], vec![0; bytes]);
                prop_assert_eq!(dtype.encode(&values, &mut row).is_ok(), fits);
                prop_assert_eq!(dtype.decode(&row, &mut values).is_ok(), fits);
            }
        }
    }
}
