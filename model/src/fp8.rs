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
#[inline(always)]
pub(crate) fn encode(value: f32) -> u8 {
    code(value) as u8
}

/// Without a branch, so that a loop over it vectorises.
#[inline(always)]
fn code(value: f32) -> u32 {
    let sign = (value.to_bits() >> 24) & 0x80;
    let magnitude = value.abs();
    let held = if magnitude > LARGEST { LARGEST } else { magnitude };
    // Normal: drop 20 bits of the fraction and take the exponent's bias from 127 to 7.
    let bits = held.to_bits();
    let normal = bits.wrapping_add(0x7_ffff + ((bits >> 20) & 1)).wrapping_sub(120 << 23) >> 20;
    // Subnormal, below 2^-6: steps of 2^-9, rounded by adding 1.5 * 2^23.
    const ROUND: f32 = 12_582_912.0;
    let subnormal = (held * 512.0 + ROUND).to_bits() & 0xff;
    let number = if held < 0.015625 { subnormal } else { normal };
    sign | if magnitude.is_nan() { 0x7f } else { number }
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

/// A place for a code: the code itself, or the value that it stands for.
pub(crate) trait Coded: Copy {
    fn of(code: u32) -> Self;
}

impl Coded for u8 {
    #[inline(always)]
    fn of(code: u32) -> Self {
        code as u8
    }
}

impl Coded for f32 {
    #[inline(always)]
    fn of(code: u32) -> Self {
        decode(code as u8)
    }
}

/// Quantises rows of `width` values group by group into `codes`, as long as `values`, and each group's scale into `scales`
/// `[rows, fp8_groups(width)]`.
pub(crate) fn quantise<C: Coded>(values: &[f32], width: usize, scales: &mut [f32], codes: &mut [C]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { quantise_avx2(values, width, scales, codes) };
    }
    quantise_groups(values, width, scales, codes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantise_avx2<C: Coded>(values: &[f32], width: usize, scales: &mut [f32], codes: &mut [C]) {
    quantise_groups(values, width, scales, codes);
}

#[inline(always)]
fn quantise_groups<C: Coded>(values: &[f32], width: usize, scales: &mut [f32], codes: &mut [C]) {
    let width = width.max(1);
    let rows = values.chunks_exact(width).zip(codes.chunks_exact_mut(width));
    let groups = rows.flat_map(|(row, codes)| row.chunks(FP8_GROUP).zip(codes.chunks_mut(FP8_GROUP)));
    for ((group, codes), scale) in groups.zip(scales) {
        *scale = largest(group) / LARGEST;
        let scale = *scale;
        for (to, value) in codes.iter_mut().zip(group) {
            *to = C::of(code(value / scale));
        }
    }
}

/// The largest magnitude; NaN counts for nothing.
#[inline(always)]
fn largest(group: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (lines, rest) = group.as_chunks::<16>();
    let mut lanes = [SMALLEST_MAGNITUDE; 16];
    for line in lines {
        for (lane, value) in lanes.iter_mut().zip(line) {
            *lane = larger(*lane, value.abs());
        }
    }
    lanes.into_iter().chain(rest.iter().map(|value| value.abs())).fold(SMALLEST_MAGNITUDE, larger)
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
    quantise(values, width, scales, codes);
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
            let (mut codes, mut scales) = (vec![0u8; values.len()], vec![0.0; rows * fp8_groups(width)]);
            quantise(&values, width, &mut scales, &mut codes);
            let mut decoded = vec![0.0f32; values.len()];
            quantise(&values, width, &mut scales, &mut decoded);
            prop_assert!(codes.iter().zip(&decoded).all(|(code, value)| decode(*code) == *value));
            for (i, value) in values.iter().enumerate() {
                let scale = scales[i / width * fp8_groups(width) + i % width / FP8_GROUP];
                let back = decode(codes[i]) * scale;
                prop_assert!((back - value).abs() <= (value.abs() / 15.9).max(scale / 1000.0), "{} {}", value, back);
            }
        }
    }
}
