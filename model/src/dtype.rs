//! The compute type and its rounding points.

use half::bf16;

/// What is computed in: what activations are rounded to, what the cache stores, and how FP8 weights are multiplied.
///
/// Activations always travel in `f32` buffers; where they are rounded to bf16, every value in them is one that bf16 can
/// represent. Sums are accumulated in f32 before they are rounded. Weights stay in the checkpoint's own type; FP8 ones
/// are multiplied with activations as they are ([`Dtype::F32`], [`Dtype::Bf16`]) or with activations that are quantised
/// likewise ("W8A8").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit floating point: exact, for tests and small models.
    F32,
    /// bfloat16, the type of the released checkpoint.
    Bf16,
    /// W8A8 for linear layers whose weights are FP8, bfloat16 for all else: how the released FP8 checkpoint is served.
    Fp8,
    /// W8A8 for linear layers whose weights are FP8, 32-bit floating point for all else: for tests.
    Fp8F32,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Fp8, Self::Fp8F32];

    /// Bytes of one element of the key/value cache.
    pub const fn bytes(self) -> usize {
        if self.rounds() { 2 } else { 4 }
    }

    /// The type's name as a configuration spells it: `f32`, `bf16`, `fp8` or `fp8-f32`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Fp8F32 => "fp8-f32",
        }
    }

    /// Whether activations are rounded to bf16.
    pub const fn rounds(self) -> bool {
        matches!(self, Self::Bf16 | Self::Fp8)
    }

    /// Whether activations are quantised before they are multiplied with FP8 weights.
    pub const fn quantises(self) -> bool {
        matches!(self, Self::Fp8 | Self::Fp8F32)
    }

    /// `value` rounded to what activations are rounded to, half to even.
    #[inline]
    pub(crate) fn round(self, value: f32) -> f32 {
        if self.rounds() { round_bf16(value) } else { value }
    }

    /// Rounds a buffer in place.
    pub(crate) fn round_all(self, values: &mut [f32]) {
        if self.rounds() {
            values.iter_mut().for_each(|value| *value = round_bf16(*value));
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Dtype {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "float32" => Ok(Self::F32),
            "bfloat16" => Ok(Self::Bf16),
            _ => Self::ALL
                .into_iter()
                .find(|dtype| dtype.name() == name)
                .ok_or_else(|| format!("`{name}` is not a compute type; use f32, bf16, fp8 or fp8-f32")),
        }
    }
}

/// Branch-free rounding to bf16 for every value but NaN, which stays NaN; a plain loop over it vectorises.
#[inline]
pub(crate) fn round_bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    let rounded = f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000);
    if value.is_nan() { value } else { rounded }
}

/// `value` as bf16, for storing what [`round_bf16`] has already rounded or what must be rounded now.
#[inline]
pub(crate) fn to_bf16(value: f32) -> bf16 {
    bf16::from_f32(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_agrees_with_the_half_crate_on_ties_extremes_and_a_sweep() {
        let ties = [0x3f80_8000u32, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001, 0x7f7f_ffff, 0x7f80_0000, 0x8000_0001, 1];
        let sweep = (0..200_000u32).map(|i| i.wrapping_mul(0x9e37_79b9));
        for bits in ties.into_iter().chain(sweep) {
            let value = f32::from_bits(bits);
            if value.is_nan() {
                assert!(round_bf16(value).is_nan());
            } else {
                assert_eq!(round_bf16(value).to_bits(), bf16::from_f32(value).to_f32().to_bits(), "{value:e}");
            }
        }
    }
}
