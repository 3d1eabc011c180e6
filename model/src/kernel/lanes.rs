//! Sixteen f32 lanes on each instruction set: the vocabulary that the products are written in, once.

use half::bf16;

use crate::fp8;

/// Lanes of every accumulator, on every processor, so that sums associate alike everywhere.
pub(crate) const WIDTH: usize = 16;

/// Sixteen f32 values that are worked on together.
///
/// # Safety
/// A method may be called only on a processor that has the implementation's instruction set.
pub(crate) trait Lanes: Copy {
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(values: &[f32; WIDTH]) -> Self;
    unsafe fn load_bf16(values: &[bf16; WIDTH]) -> Self;
    /// FP8 codes, none of which is NaN.
    unsafe fn load_fp8(codes: &[u8; WIDTH]) -> Self;
    unsafe fn store(self, values: &mut [f32; WIDTH]);
    /// `self + a * b`, fused where the processor can.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// The sum of all lanes: one half is added to the other, then halves of that, down to one.
    unsafe fn sum(self) -> f32;
}

/// An element that weights or the cache are stored in; both kinds widen to f32 exactly.
pub(crate) trait Scalar: Copy + Default {
    fn from_f32(value: f32) -> Self;

    /// # Safety
    /// As for [`Lanes`].
    unsafe fn load<L: Lanes>(values: &[Self; WIDTH]) -> L;
}

impl Scalar for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(values: &[Self; WIDTH]) -> L {
        // SAFETY: the caller's promise is the same.
        unsafe { L::load(values) }
    }
}

impl Scalar for bf16 {
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(values: &[Self; WIDTH]) -> L {
        // SAFETY: the caller's promise is the same.
        unsafe { L::load_bf16(values) }
    }
}

/// Lanes in plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; WIDTH]);

impl Lanes for Portable {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; WIDTH])
    }

    #[inline(always)]
    unsafe fn load(values: &[f32; WIDTH]) -> Self {
        Self(*values)
    }

    #[inline(always)]
    unsafe fn load_bf16(values: &[bf16; WIDTH]) -> Self {
        Self(values.map(|value| f32::from_bits(u32::from(value.to_bits()) << 16)))
    }

    #[inline(always)]
    unsafe fn load_fp8(codes: &[u8; WIDTH]) -> Self {
        Self(codes.map(fp8::decode))
    }

    #[inline(always)]
    unsafe fn store(self, values: &mut [f32; WIDTH]) {
        *values = self.0;
    }

    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for lane in 0..WIDTH {
            // Without the instruction, a fused operation would be a library call for each lane.
            self.0[lane] = if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
                a.0[lane].mul_add(b.0[lane], self.0[lane])
            } else {
                self.0[lane] + a.0[lane] * b.0[lane]
            };
        }
        self
    }

    #[inline(always)]
    unsafe fn sum(mut self) -> f32 {
        let mut half = WIDTH / 2;
        while half > 0 {
            for lane in 0..half {
                self.0[lane] += self.0[lane + half];
            }
            half /= 2;
        }
        self.0[0]
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Lanes, WIDTH, bf16};

    /// Two registers of AVX2 with FMA and F16C.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    /// One register of AVX-512F.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller promises AVX2.
            unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn load(values: &[f32; WIDTH]) -> Self {
            // SAFETY: the caller promises AVX2; the array holds 16 floats, and unaligned loads are used.
            unsafe { Self(_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))) }
        }

        #[inline(always)]
        unsafe fn load_bf16(values: &[bf16; WIDTH]) -> Self {
            // SAFETY: the caller promises AVX2; the array holds 32 bytes, and `bf16` is a transparent `u16`, whose bits
            // are the upper half of the f32's.
            unsafe {
                let low = _mm_loadu_si128(values.as_ptr().cast());
                let high = _mm_loadu_si128(values.as_ptr().add(8).cast());
                let widen = |half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)));
                Self(widen(low), widen(high))
            }
        }

        #[inline(always)]
        unsafe fn load_fp8(codes: &[u8; WIDTH]) -> Self {
            // SAFETY: the caller promises AVX2 and F16C; the array holds 16 bytes.
            unsafe {
                let halves = fp8_to_f16(_mm_loadu_si128(codes.as_ptr().cast()));
                let bias = _mm256_set1_ps(FP8_FROM_F16);
                let low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
                let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves));
                Self(_mm256_mul_ps(low, bias), _mm256_mul_ps(high, bias))
            }
        }

        #[inline(always)]
        unsafe fn store(self, values: &mut [f32; WIDTH]) {
            // SAFETY: the caller promises AVX2; the array holds 16 floats, and unaligned stores are used.
            unsafe {
                _mm256_storeu_ps(values.as_mut_ptr(), self.0);
                _mm256_storeu_ps(values.as_mut_ptr().add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: the caller promises AVX2 and FMA.
            unsafe { Self(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: the caller promises AVX2.
            unsafe { sum_8(_mm256_add_ps(self.0, self.1)) }
        }
    }

    impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller promises AVX-512F.
            unsafe { Self(_mm512_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn load(values: &[f32; WIDTH]) -> Self {
            // SAFETY: the caller promises AVX-512F; the array holds 16 floats, and an unaligned load is used.
            unsafe { Self(_mm512_loadu_ps(values.as_ptr())) }
        }

        #[inline(always)]
        unsafe fn load_bf16(values: &[bf16; WIDTH]) -> Self {
            // SAFETY: the caller promises AVX-512F; the array holds 32 bytes, and `bf16` is a transparent `u16`, whose
            // bits are the upper half of the f32's.
            unsafe {
                let halves = _mm256_loadu_si256(values.as_ptr().cast());
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))))
            }
        }

        #[inline(always)]
        unsafe fn load_fp8(codes: &[u8; WIDTH]) -> Self {
            // SAFETY: the caller promises AVX-512F, which includes AVX2; the array holds 16 bytes.
            unsafe {
                let halves = fp8_to_f16(_mm_loadu_si128(codes.as_ptr().cast()));
                Self(_mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(FP8_FROM_F16)))
            }
        }

        #[inline(always)]
        unsafe fn store(self, values: &mut [f32; WIDTH]) {
            // SAFETY: the caller promises AVX-512F; the array holds 16 floats, and an unaligned store is used.
            unsafe { _mm512_storeu_ps(values.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: the caller promises AVX-512F.
            unsafe { Self(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: the caller promises AVX-512F, which includes AVX2.
            unsafe {
                let low = _mm512_castps512_ps256(self.0);
                let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
                sum_8(_mm256_add_ps(low, high))
            }
        }
    }

    /// What an FP8 value is of the f16 that has its bits: the exponents' biases are 7 and 15.
    const FP8_FROM_F16: f32 = 256.0;

    /// The f16s that have the sign, exponent and fraction of 16 FP8 codes: each code becomes the upper byte, is shifted
    /// down by the exponent's additional bit, and leaves the sign behind.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn fp8_to_f16(codes: __m128i) -> __m256i {
        // SAFETY: the caller promises AVX2.
        unsafe {
            let upper = _mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(codes));
            _mm256_and_si256(_mm256_srai_epi16::<1>(upper), _mm256_set1_epi16(0xbf80_u16 as i16))
        }
    }

    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn sum_8(values: __m256) -> f32 {
        // SAFETY: the caller promises AVX2.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps::<1>(values));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}
