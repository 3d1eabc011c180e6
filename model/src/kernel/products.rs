//! Products with cached keys and values, written once over [`Lanes`] and compiled once for each instruction set.
//!
//! Blocking decides only *when* an output element is computed, never how: a tile of `R` rows by `N` columns keeps one
//! accumulator for each element, and tiles of every shape run the same additions.

use std::array::from_fn;

use super::lanes::{Lanes, Scalar, WIDTH};

/// See [`super::Isa::matmul`].
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn matmul<L: Lanes, S: Scalar, const R: usize, const N: usize>(
    x: &[f32],
    w: &[S],
    k: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    if k == 0 {
        out.fill(0.0);
        return;
    }
    let columns = w.len() / k;
    let whole = columns - columns % N;
    // SAFETY: the caller's promise is the same.
    unsafe {
        for first in (0..whole).step_by(N) {
            let w: [&[S]; N] = from_fn(|i| &w[(first + i) * k..][..k]);
            some_columns::<L, S, R, N>(x, w, first, out, out_stride);
        }
        for column in whole..columns {
            some_columns::<L, S, R, 1>(x, [&w[column * k..][..k]], column, out, out_stride);
        }
    }
}

/// `N` columns of the output, from column `first`, for all rows of `x`.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
unsafe fn some_columns<L: Lanes, S: Scalar, const R: usize, const N: usize>(
    x: &[f32],
    w: [&[S]; N],
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let k = w[0].len();
    let rows = x.len() / k;
    let whole = rows - rows % R;
    // SAFETY: the caller's promise is the same.
    unsafe {
        for row in (0..whole).step_by(R) {
            let sums = tile::<L, S, R, N>(from_fn(|i| &x[(row + i) * k..][..k]), w);
            for (i, sums) in sums.iter().enumerate() {
                out[(row + i) * out_stride + first..][..N].copy_from_slice(sums);
            }
        }
        for row in whole..rows {
            let [sums] = tile::<L, S, 1, N>([&x[row * k..][..k]], w);
            out[row * out_stride + first..][..N].copy_from_slice(&sums);
        }
    }
}

/// All dot products of `R` rows with `N` columns, all of one length.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
unsafe fn tile<L: Lanes, S: Scalar, const R: usize, const N: usize>(x: [&[f32]; R], w: [&[S]; N]) -> [[f32; N]; R] {
    let steps = x[0].len() / WIDTH;
    let xs: [&[[f32; WIDTH]]; R] = from_fn(|r| &x[r].as_chunks().0[..steps]);
    let ws: [&[[S; WIDTH]]; N] = from_fn(|n| &w[n].as_chunks().0[..steps]);
    let mut sums = [[0.0; N]; R];
    // SAFETY: the caller's promise is the same.
    unsafe {
        let mut lanes = [[L::splat(0.0); N]; R];
        for step in 0..steps {
            let mut columns = [L::splat(0.0); N];
            for n in 0..N {
                columns[n] = S::load(&ws[n][step]);
            }
            for r in 0..R {
                let row = L::load(&xs[r][step]);
                for n in 0..N {
                    lanes[r][n] = lanes[r][n].add_product(row, columns[n]);
                }
            }
        }
        if steps * WIDTH < x[0].len() {
            for r in 0..R {
                let row = L::load(&padded(x[r].as_chunks::<WIDTH>().1));
                for n in 0..N {
                    let column = S::load(&padded(w[n].as_chunks::<WIDTH>().1));
                    lanes[r][n] = lanes[r][n].add_product(row, column);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                sums[r][n] = lanes[r][n].sum();
            }
        }
    }
    sums
}

/// See [`super::Isa::add_weighted`].
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn add_weighted<L: Lanes, S: Scalar>(p: &[f32], p_stride: usize, v: &[S], d: usize, out: &mut [f32]) {
    let tokens = v.len() / d.max(1);
    for (head, out) in out.chunks_exact_mut(d.max(1)).enumerate() {
        let p = &p[head * p_stride..][..tokens];
        let (whole, rest) = out.as_chunks_mut::<WIDTH>();
        let tail = whole.len() * WIDTH;
        // SAFETY: the caller's promise is the same.
        unsafe {
            for (i, out) in whole.iter_mut().enumerate() {
                let mut sum = L::load(out);
                for (t, p) in p.iter().enumerate() {
                    let row = &v[t * d..][..d].as_chunks::<WIDTH>().0[i];
                    sum = sum.add_product(L::splat(*p), S::load(row));
                }
                sum.store(out);
            }
            if !rest.is_empty() {
                let mut last = padded(rest);
                let mut sum = L::load(&last);
                for (t, p) in p.iter().enumerate() {
                    sum = sum.add_product(L::splat(*p), S::load(&padded(&v[t * d + tail..][..rest.len()])));
                }
                sum.store(&mut last);
                rest.copy_from_slice(&last[..rest.len()]);
            }
        }
    }
}

/// The last elements of a row, filled up with zeros.
#[inline(always)]
fn padded<S: Scalar>(rest: &[S]) -> [S; WIDTH] {
    let mut lanes = [S::default(); WIDTH];
    lanes[..rest.len()].copy_from_slice(rest);
    lanes
}

/// Instantiates the products for one instruction set, with tiles of `$rows` x `$columns` that fit its registers; a
/// single row takes `$alone` columns at once, to keep as many accumulators in flight. Of weights, `$panels` panels are
/// multiplied at once.
#[cfg(target_arch = "x86_64")]
macro_rules! instruction_set {
    ($module:ident, $lanes:ident, $features:literal, $rows:literal x $columns:literal, 1 x $alone:literal, $panels:literal) => {
        pub(super) mod $module {
            use crate::kernel::gemm::{self, Left, Out, Panels, Stored};
            use crate::kernel::lanes::{Scalar, $lanes};

            #[target_feature(enable = $features)]
            pub(in crate::kernel) fn matmul<S: Scalar>(x: &[f32], w: &[S], k: usize, out: &mut [f32], stride: usize) {
                // SAFETY: this function itself is compiled for, and may only be called with, the instruction set.
                unsafe {
                    if x.len() == k {
                        super::matmul::<$lanes, S, 1, $alone>(x, w, k, out, stride);
                    } else {
                        super::matmul::<$lanes, S, $rows, $columns>(x, w, k, out, stride);
                    }
                }
            }

            #[target_feature(enable = $features)]
            pub(in crate::kernel) fn add_weighted<S: Scalar>(
                p: &[f32],
                p_stride: usize,
                v: &[S],
                d: usize,
                out: &mut [f32],
            ) {
                // SAFETY: this function itself is compiled for, and may only be called with, the instruction set.
                unsafe { super::add_weighted::<$lanes, S>(p, p_stride, v, d, out) }
            }

            #[target_feature(enable = $features)]
            pub(in crate::kernel) fn multiply<S: Stored>(left: Left<'_>, panels: Panels<'_, S>, out: Out<'_>) {
                // SAFETY: this function itself is compiled for, and may only be called with, the instruction set.
                unsafe { gemm::multiply::<$lanes, S, $panels>(left, panels, out) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
instruction_set!(avx2, Avx2, "avx2,fma,f16c", 2 x 2, 1 x 4, 1);
#[cfg(target_arch = "x86_64")]
instruction_set!(avx512, Avx512, "avx512f,avx512vl", 4 x 4, 1 x 8, 2);
