//! Block FP8: E4M3 values, f32 scales, and the dynamic quantisation of activations.
//!
//! Weights come in blocks of 128 x 128 with one scale each, activations in groups of 128 along a row: a value is its
//! E4M3 number times its scale. A row's scales are `max(amax, 1e-10) / 448`, one a group, as vLLM's and DeepSeek's
//! kernels compute them.

use crate::ModelError;
use crate::stage::check_len;

/// Elements that share a scale along each dimension.
pub const FP8_BLOCK: usize = 128;

/// The largest E4M3 number.
const LARGEST: f32 = 448.0;
/// Keeps the scale of a group of zeros above zero.
const LEAST_AMAX: f32 = 1e-10;

/// One E4M3 number (`e4m3fn`: no infinities, NaN is all ones).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub(crate) struct E4m3(pub(crate) u8);

impl E4m3 {
    /// The nearest number, half to even; what is beyond ±448 becomes ±448, NaN becomes NaN.
    #[inline]
    pub(crate) fn from_f32(value: f32) -> Self {
        let sign = (value.to_bits() >> 24) as u8 & 0x80;
        let magnitude = value.abs().min(LARGEST);
        let bits = magnitude.to_bits();
        // Drop 20 mantissa bits, half to even, and move the exponent's bias from 127 to 7.
        let normal = ((bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20).wrapping_sub(120 << 3) as u8;
        // Below 2^-6 numbers are multiples of 2^-9, which adding 2^23 rounds to.
        let subnormal = (magnitude * 512.0 + 8_388_608.0).to_bits() as u8;
        let number = if magnitude < 0.015_625 { subnormal } else { normal };
        if value.is_nan() { Self(sign | 0x7f) } else { Self(sign | number) }
    }

    pub(crate) fn to_f32(self) -> f32 {
        if self.is_nan() { f32::NAN } else { self.scaled() * 256.0 }
    }

    pub(crate) fn is_nan(self) -> bool {
        self.0 & 0x7f == 0x7f
    }

    /// The number over 2^8, exactly, as it falls out of the half-precision format that kernels decode through.
    #[inline(always)]
    pub(crate) fn scaled(self) -> f32 {
        let bits = u32::from(self.0);
        // Placed in an f32 the exponent is 120 too small; 2^112 leaves 2^-8.
        f32::from_bits(((bits & 0x80) << 24) | ((bits & 0x7f) << 20)) * f32::from_bits((112 + 127) << 23)
    }
}

/// Scales of a row of `width` elements.
pub const fn fp8_groups(width: usize) -> usize {
    width.div_ceil(FP8_BLOCK)
}

/// Quantises rows of activations for the wire: `x` `[rows, width]` to E4M3 bytes `[rows, width]` and scales
/// `[rows, fp8_groups(width)]`.
///
/// # Errors
/// [`ModelError::Length`] for buffers of other lengths, before anything is written.
pub fn quantise(x: &[f32], width: usize, bytes: &mut [u8], scales: &mut [f32]) -> Result<(), ModelError> {
    check(x.len(), width, bytes.len(), scales.len())?;
    for_each_group(x, width, scales, |offset, group, scale| {
        for (byte, x) in bytes[offset..].iter_mut().zip(group) {
            *byte = E4m3::from_f32(x / scale).0;
        }
    });
    Ok(())
}

/// Reads E4M3 bytes as f32 numbers, not multiplied by their scales: the form that stages take quantised rows in.
///
/// # Errors
/// [`ModelError::Length`] unless both are of one length, before anything is written.
pub fn read_quantised(bytes: &[u8], numbers: &mut [f32]) -> Result<(), ModelError> {
    check_len("numbers", numbers.len(), bytes.len())?;
    for (number, byte) in numbers.iter_mut().zip(bytes) {
        *number = E4m3(*byte).to_f32();
    }
    Ok(())
}

/// As [`quantise`], leaving the E4M3 numbers in `numbers` as f32.
pub(crate) fn quantise_in_place(numbers: &mut [f32], width: usize, scales: &mut [f32]) {
    for (row, scales) in numbers.chunks_exact_mut(width).zip(scales.chunks_exact_mut(fp8_groups(width))) {
        for (group, scale) in row.chunks_mut(FP8_BLOCK).zip(scales) {
            *scale = scale_of(group);
            group.iter_mut().for_each(|x| *x = E4m3::from_f32(*x / *scale).to_f32());
        }
    }
}

fn scale_of(group: &[f32]) -> f32 {
    group.iter().fold(LEAST_AMAX, |amax, x| amax.max(x.abs())) / LARGEST
}

fn for_each_group(x: &[f32], width: usize, scales: &mut [f32], mut each: impl FnMut(usize, &[f32], f32)) {
    let rows = x.chunks_exact(width.max(1)).zip(scales.chunks_exact_mut(fp8_groups(width).max(1)));
    for (row, (x, scales)) in rows.enumerate() {
        for (index, (group, scale)) in x.chunks(FP8_BLOCK).zip(scales).enumerate() {
            *scale = scale_of(group);
            each(row * width + index * FP8_BLOCK, group, *scale);
        }
    }
}

fn check(x: usize, width: usize, bytes: usize, scales: usize) -> Result<(), ModelError> {
    let rows = x.div_ceil(width.max(1));
    check_len("x", x, rows * width)?;
    check_len("bytes", bytes, x)?;
    check_len("scales", scales, rows * fp8_groups(width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every finite number of the format from its definition, in ascending order from zero.
    fn numbers() -> Vec<f32> {
        (0..0x7f_u8)
            .map(|bits| {
                let (exponent, mantissa) = (i32::from(bits >> 3), f32::from(bits & 7));
                if exponent == 0 { mantissa * 2f32.powi(-9) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) }
            })
            .collect()
    }

    #[test]
    fn every_number_reads_as_its_definition_and_is_its_own_nearest() {
        for (bits, number) in numbers().into_iter().enumerate() {
            for (bits, number) in [(bits as u8, number), (bits as u8 | 0x80, -number)] {
                assert_eq!(E4m3(bits).to_f32().to_bits(), number.to_bits(), "{bits:#x}");
                assert_eq!(E4m3(bits).scaled(), number / 256.0);
                assert_eq!(E4m3::from_f32(number), E4m3(bits));
            }
        }
        assert!(E4m3(0x7f).to_f32().is_nan() && E4m3(0xff).to_f32().is_nan());
        assert!(E4m3::from_f32(f32::NAN).is_nan() && E4m3::from_f32(-f32::NAN).is_nan());
        assert_eq!((E4m3::from_f32(1e9), E4m3::from_f32(f32::NEG_INFINITY)), (E4m3(0x7e), E4m3(0xfe)));
    }

    #[test]
    fn a_tie_goes_to_the_even_number_and_what_is_beside_it_to_the_nearer() {
        for (low, pair) in numbers().windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            let even = low + low % 2;
            assert_eq!(usize::from(E4m3::from_f32(middle).0), even, "{middle}");
            assert_eq!(usize::from(E4m3::from_f32(middle.next_down()).0), low);
            assert_eq!(usize::from(E4m3::from_f32(middle.next_up()).0), low + 1);
        }
    }

    proptest! {
        #[test]
        fn a_quantised_row_is_within_a_sixteenth_of_each_value(
            x in prop::collection::vec(-1e4f32..1e4, 300), zeros in 0usize..300
        ) {
            let mut x = x;
            x[..zeros].fill(0.0);
            let (mut bytes, mut scales) = (vec![0; 300], vec![0.0; 3]);
            quantise(&x, 300, &mut bytes, &mut scales).unwrap();
            let mut numbers = vec![0.0; 300];
            read_quantised(&bytes, &mut numbers).unwrap();
            let (mut in_place, mut same_scales) = (x.clone(), vec![0.0; 3]);
            quantise_in_place(&mut in_place, 300, &mut same_scales);
            prop_assert_eq!(&numbers, &in_place);
            prop_assert_eq!(&scales, &same_scales);
            for (i, (x, number)) in x.iter().zip(&numbers).enumerate() {
                let scale = scales[i / FP8_BLOCK];
                prop_assert!((x - number * scale).abs() <= x.abs() / 16.0 + scale * 2f32.powi(-10) * 1.001);
            }
        }
    }

    #[test]
    fn buffers_of_other_lengths_are_refused() {
        let (mut bytes, mut scales) = ([0; 300], [0.0; 3]);
        assert!(quantise(&[0.0; 300], 300, &mut bytes, &mut scales[..2]).is_err());
        assert!(quantise(&[0.0; 300], 300, &mut bytes[..299], &mut scales).is_err());
        assert!(quantise(&[0.0; 299], 300, &mut bytes, &mut scales).is_err());
        assert!(read_quantised(&bytes, &mut [0.0; 299]).is_err());
    }
}
