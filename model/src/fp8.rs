//! FP8 (E4M3, finite, no infinities) and its two scalings: weights in blocks of 128 x 128, activations in groups of 128.
//!
//! The formulas are those of DeepSeek-V3's block FP8, which the released Step-3 checkpoint uses: a group's scale is
//! `max(largest magnitude, 1e-10) / 448`, its codes are the values over the scale, rounded half to even.

use crate::ModelError;
use crate::stage::check_len;

/// Rows and columns of a weight block, and elements of an activation group.
pub const FP8_GROUP: usize = 128;

/// The largest finite magnitude.
const LARGEST: f32 = 448.0;
/// So that a group of zeros has a scale.
const SMALLEST_MAGNITUDE: f32 = 1e-10;

/// Activation groups in a row of `width`; the last one may be short.
pub const fn fp8_groups(width: usize) -> usize {
    width.div_ceil(FP8_GROUP)
}

/// The code of `value`, rounded half to even; magnitudes beyond 448 become 448. NaN becomes NaN.
#[inline]
pub(crate) fn encode(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs().min(LARGEST);
    // Normal: drop 20 bits of the fraction and take the exponent's bias from 127 to 7.
    let bits = magnitude.to_bits();
    let normal = (bits + 0x7_ffff + ((bits >> 20) & 1)).wrapping_sub(120 << 23) >> 20;
    // Subnormal, below 2^-6: steps of 2^-9, rounded by adding 1.5 * 2^23.
    const ROUND: f32 = 12_582_912.0;
    let subnormal = (magnitude * 512.0 + ROUND).to_bits() & 0xff;
    sign | if magnitude < 0.015625 { subnormal } else { normal } as u8
}

/// The value of a code.
#[inline]
pub(crate) fn decode(code: u8) -> f32 {
    let sign = u32::from(code & 0x80) << 24;
    // The exponent's bias goes from 7 to 127 by a multiplication, which makes subnormals come out right too.
    let magnitude = f32::from_bits(u32::from(code & 0x7f) << 20) * f32::from_bits((127 + 120) << 23);
    let value = if is_nan(code) { f32::NAN } else { magnitude };
    f32::from_bits(value.to_bits() | sign)
}

/// Whether the code stands for no number.
#[inline]
pub(crate) fn is_nan(code: u8) -> bool {
    code & 0x7f == 0x7f
}

/// Quantises rows of `width` values group by group: each value's code goes to `code`, in order, and each group's scale
/// to `scales` `[rows, fp8_groups(width)]`.
pub(crate) fn quantise_with(values: &[f32], width: usize, scales: &mut [f32], mut code: impl FnMut(usize, u8)) {
    let groups = values.chunks_exact(width.max(1)).flat_map(|row| row.chunks(FP8_GROUP));
    let mut index = 0;
    for (group, scale) in groups.zip(scales) {
        let largest = group.iter().fold(SMALLEST_MAGNITUDE, |largest, value| largest.max(value.abs()));
        *scale = largest / LARGEST;
        for value in group {
            code(index, encode(value / *scale));
            index += 1;
        }
    }
}

/// Quantises rows of `width` values: E4M3 `codes` `[rows, width]` and `scales` `[rows, fp8_groups(width)]`.
///
/// # Errors
/// [`ModelError::Length`] before anything is written.
pub fn quantise_rows(values: &[f32], width: usize, codes: &mut [u8], scales: &mut [f32]) -> Result<(), ModelError> {
    let rows = values.len().div_ceil(width.max(1));
    check_len("values", values.len(), rows * width)?;
    check_len("codes", codes.len(), values.len())?;
    check_len("scales", scales.len(), rows * fp8_groups(width))?;
    quantise_with(values, width, scales, |index, code| codes[index] = code);
    Ok(())
}

/// The values of quantised rows of `width`.
pub(crate) fn dequantise_rows(codes: &[u8], scales: &[f32], width: usize, values: &mut [f32]) {
    let groups = codes.chunks_exact(width.max(1)).flat_map(|row| row.chunks(FP8_GROUP));
    let mut values = values.iter_mut();
    for (group, scale) in groups.zip(scales) {
        group.iter().zip(&mut values).for_each(|(code, value)| *value = decode(*code) * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// By the definition: sign, four bits of exponent, three of fraction.
    fn defined(code: u8) -> f64 {
        let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = if exponent == 0 {
            fraction / 8.0 * 2f64.powi(-6)
        } else {
            (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7)
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_code_is_what_the_format_says_and_comes_back() {
        for code in 0..=255u8 {
            if is_nan(code) {
                assert!(decode(code).is_nan());
                continue;
            }
            assert_eq!(f64::from(decode(code)), defined(code), "{code:#x}");
            assert_eq!(encode(decode(code)), code);
        }
        assert!(is_nan(encode(f32::NAN)));
        assert_eq!((decode(encode(1e9)), decode(encode(f32::NEG_INFINITY))), (448.0, -448.0));
    }

    #[test]
    fn ties_go_to_even_codes_and_all_else_to_the_nearest() {
        for code in 0..126u8 {
            let (low, high) = (decode(code), decode(code + 1));
            let middle = (low + high) / 2.0;
            let even = if code & 1 == 0 { code } else { code + 1 };
            assert_eq!(encode(middle), even, "between {low} and {high}");
            assert_eq!(encode(f32::from_bits(middle.to_bits() - 1)), code);
            assert_eq!(encode(f32::from_bits(middle.to_bits() + 1)), code + 1);
            assert_eq!(encode(-middle), even | 0x80);
        }
    }

    proptest! {
        #[test]
        fn groups_come_back_within_their_precision(
            values in prop::collection::vec(-1e6f32..1e6, 1..400),
            rows in 1usize..3,
        ) {
            let width = values.len();
            let values = values.repeat(rows);
            let (mut codes, mut scales) = (vec![0; values.len()], vec![0.0; rows * fp8_groups(width)]);
            quantise_with(&values, width, &mut scales, |index, code| codes[index] = code);
            for (i, value) in values.iter().enumerate() {
                let scale = scales[i / width * fp8_groups(width) + i % width / FP8_GROUP];
                let back = decode(codes[i]) * scale;
                prop_assert!((back - value).abs() <= (value.abs() / 15.9).max(scale / 1000.0), "{} {}", value, back);
            }
        }
    }
}
