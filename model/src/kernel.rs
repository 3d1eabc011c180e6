//! The arithmetic: matrix products, attention sums, norms and activations, each batch-invariant.
//!
//! *Batch-invariant* means that an output element is always computed by the same operations in the same order,
//! whatever else is in the batch. Products with weights ([`matrix`]) are one chain of additions an output; products with
//! cached keys and values ([`products`]) run in 16 lane accumulators that one fixed tree adds up. Processors with fused multiply-add (AVX2, AVX-512, NEON) agree bit for bit; the plain fallback differs in the last
//! bits.

mod cores;
mod elementwise;
mod gemm;
mod lanes;
mod matrix;
mod products;

pub(crate) use cores::Cores;
pub(crate) use elementwise::{Softmax, rms_norm, rotate, silu_times};
pub(crate) use lanes::{Scalar, WIDTH};
pub(crate) use matrix::{Activations, Matrix, QuantiseScratch, Table, Values, Weights};

use gemm::{Left, Out, Panels, Stored};
use lanes::Portable;

/// The instruction set that the products run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// Plain Rust that the compiler vectorises for its target.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The widest set that this processor has.
    pub(crate) fn detect() -> Self {
        Self::available().last().copied().unwrap_or(Self::Portable)
    }

    /// Every set that this processor has, narrowest first.
    fn available() -> &'static [Self] {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                return &[Self::Portable, Self::Avx2, Self::Avx512];
            }
            let fused = is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if is_x86_feature_detected!("avx2") && fused {
                return &[Self::Portable, Self::Avx2];
            }
        }
        &[Self::Portable]
    }

    /// `out[r * out_stride + n] = sum over i of x[r, i] * w[n, i]`, for all rows of `x` `[rows, k]` and of `w` `[n, k]`.
    pub(crate) fn matmul<S: Scalar>(self, x: &[f32], w: &[S], k: usize, out: &mut [f32], out_stride: usize) {
        match self {
            Self::Portable => {
                // SAFETY: the portable lanes need no processor feature.
                unsafe { products::matmul::<Portable, S, 1, 4>(x, w, k, out, out_stride) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                // SAFETY: `available` gives out `Avx2` only where AVX2, FMA and F16C were detected.
                unsafe { products::avx2::matmul(x, w, k, out, out_stride) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                // SAFETY: `available` gives out `Avx512` only where AVX-512F and VL were detected.
                unsafe { products::avx512::matmul(x, w, k, out, out_stride) }
            }
        }
    }

    /// `out = left * panels^T`.
    fn multiply<S: Stored>(self, left: Left<'_>, panels: Panels<'_, S>, out: Out<'_>) {
        match self {
            Self::Portable => {
                // SAFETY: the portable lanes need no processor feature.
                unsafe { gemm::multiply::<Portable, S, 1>(left, panels, out) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                // SAFETY: `available` gives out `Avx2` only where AVX2, FMA and F16C were detected.
                unsafe { products::avx2::multiply(left, panels, out) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                // SAFETY: `available` gives out `Avx512` only where AVX-512F and VL were detected.
                unsafe { products::avx512::multiply(left, panels, out) }
            }
        }
    }

    /// `out[h, i] += sum over t of p[h * p_stride + t] * v[t, i]`, in the order of `t`, for all rows of `v` `[t, d]` and
    /// of `out` `[h, d]`.
    pub(crate) fn add_weighted<S: Scalar>(self, p: &[f32], p_stride: usize, v: &[S], d: usize, out: &mut [f32]) {
        match self {
            Self::Portable => {
                // SAFETY: the portable lanes need no processor feature.
                unsafe { products::add_weighted::<Portable, S>(p, p_stride, v, d, out) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                // SAFETY: `available` gives out `Avx2` only where AVX2, FMA and F16C were detected.
                unsafe { products::avx2::add_weighted(p, p_stride, v, d, out) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                // SAFETY: `available` gives out `Avx512` only where AVX-512F and VL were detected.
                unsafe { products::avx512::add_weighted(p, p_stride, v, d, out) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Numbers in -1..1 that differ from index to index.
    pub(super) fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn matmul(isa: Isa, x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
        let n = w.len() / k;
        let mut out = vec![0.0; x.len() / k * n];
        isa.matmul(x, w, k, &mut out, n);
        out
    }

    #[test]
    fn products_are_right_on_every_instruction_set_at_odd_sizes() {
        for (rows, n, k) in [(1, 1, 1), (1, 9, 16), (2, 3, 17), (5, 13, 40), (9, 33, 257)] {
            let (x, w) = (noise(rows * k, 1), noise(n * k, 2));
            for isa in Isa::available() {
                let out = matmul(*isa, &x, &w, k);
                for (i, found) in out.iter().enumerate() {
                    let (row, col) = (i / n, i % n);
                    let exact: f64 = (0..k).map(|j| f64::from(x[row * k + j]) * f64::from(w[col * k + j])).sum();
                    assert!((exact - f64::from(*found)).abs() < 1e-5, "{isa:?} {rows}x{n}x{k}: {exact} {found}");
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_alone_and_in_any_batch() {
        let (rows, n, k) = (11, 21, 300);
        let (x, w) = (noise(rows * k, 3), noise(n * k, 4));
        for isa in Isa::available() {
            let together = matmul(*isa, &x, &w, k);
            for row in 0..rows {
                let alone = matmul(*isa, &x[row * k..][..k], &w, k);
                assert_eq!(alone, together[row * n..][..n], "{isa:?} row {row}");
            }
        }
    }

    #[test]
    fn wide_instruction_sets_agree_bit_for_bit() {
        let (rows, n, k) = (7, 19, 333);
        let (x, w) = (noise(rows * k, 5), noise(n * k, 6));
        let fused: Vec<_> = Isa::available().iter().filter(|isa| **isa != Isa::Portable).collect();
        for pair in fused.windows(2) {
            assert_eq!(matmul(*pair[0], &x, &w, k), matmul(*pair[1], &x, &w, k));
        }
    }

    #[test]
    fn bf16_weights_give_what_the_same_values_in_f32_give() {
        let (n, k) = (10, 70);
        let x = noise(3 * k, 7);
        let narrow: Vec<bf16> = noise(n * k, 8).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = narrow.iter().map(|value| value.to_f32()).collect();
        for isa in Isa::available() {
            let mut out = vec![0.0; 3 * n];
            isa.matmul(&x, &narrow, k, &mut out, n);
            assert_eq!(out, matmul(*isa, &x, &wide, k), "{isa:?}");
        }
    }

    #[test]
    fn weighted_sums_are_right_and_do_not_depend_on_where_the_rows_are_cut() {
        let (heads, tokens, d) = (3, 21, 38);
        let (p, v) = (noise(heads * tokens, 9), noise(tokens * d, 10));
        for isa in Isa::available() {
            let mut whole = vec![0.0; heads * d];
            isa.add_weighted(&p, tokens, &v, d, &mut whole);
            for (i, found) in whole.iter().enumerate() {
                let term = |t: usize| f64::from(p[i / d * tokens + t]) * f64::from(v[t * d + i % d]);
                assert!(((0..tokens).map(term).sum::<f64>() - f64::from(*found)).abs() < 1e-5);
            }
            let mut cut = vec![0.0; heads * d];
            isa.add_weighted(&p, tokens, &v[..5 * d], d, &mut cut);
            isa.add_weighted(&p[5..], tokens, &v[5 * d..], d, &mut cut);
            assert_eq!(whole, cut, "{isa:?}");
        }
    }
}
