//! Products with weights: one kernel for every batch size, weight type and instruction set.
//!
//! Weights lie in panels of 16 output columns, so that 16 outputs are worked on at once and no sum runs across lanes.
//! An output is a chain of fused additions in each block of 128 of the shared dimension; the blocks' sums, each times its
//! scale, are added up in turn. Rows, columns and threads decide only *when* that is done, never in which order: results
//! do not depend on the batch.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::lanes::{Lanes, WIDTH};
use crate::fp8::FP8_GROUP;

/// Steps of the shared dimension that are widened at once: one panel's part is 8 KiB, which stays in the first cache.
const BLOCK: usize = FP8_GROUP;
/// Rows of the largest tile.
const ROWS: usize = 6;
/// Panels that are worked on together at most.
const MOST_PANELS: usize = 4;

/// Sixteen columns' weights of one step of the shared dimension.
pub(super) trait Stored: Copy {
    /// Whether each block has a scale.
    const SCALED: bool;

    /// Sixteen weights as f32.
    ///
    /// # Safety
    /// The processor has the instruction set of `L`.
    unsafe fn widen<L: Lanes>(&self) -> L;
}

impl Stored for [f32; WIDTH] {
    const SCALED: bool = false;

    #[inline(always)]
    unsafe fn widen<L: Lanes>(&self) -> L {
        // SAFETY: the caller's promise is the same.
        unsafe { L::load(self) }
    }
}

impl Stored for [bf16; WIDTH] {
    const SCALED: bool = false;

    #[inline(always)]
    unsafe fn widen<L: Lanes>(&self) -> L {
        // SAFETY: the caller's promise is the same.
        unsafe { L::load_bf16(self) }
    }
}

impl Stored for [u8; WIDTH] {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn widen<L: Lanes>(&self) -> L {
        // SAFETY: the caller's promise is the same.
        unsafe { L::load_fp8(self) }
    }
}

/// Rows of the left factor.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    /// `[rows, k]`.
    pub(super) values: &'a [f32],
    /// Of each row and block `[rows, blocks]`; empty where all are 1.
    pub(super) scales: &'a [f32],
}

/// Panels of weights: those of the columns `16 * i` onwards.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a, S> {
    /// `[panels, k]`.
    pub(super) weights: &'a [S],
    /// `[panels, blocks]`; empty unless `S` is scaled.
    pub(super) scales: &'a [[f32; WIDTH]],
    pub(super) k: usize,
}

/// Some columns of where the products go.
pub(super) struct Out<'a> {
    /// Row 0 of the first of these columns.
    start: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
    values: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a borrow of floats; who shares it with another thread promises by `columns` that no two write the same.
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    /// All columns of `[rows, stride]`.
    pub(super) fn new(values: &'a mut [f32], stride: usize) -> Self {
        let rows = values.len() / stride.max(1);
        Self { start: values.as_mut_ptr(), stride, rows, columns: stride, values: PhantomData }
    }

    /// The columns in `range`, which must be columns of it.
    ///
    /// # Safety
    /// No column is used through two values at the same time.
    pub(super) unsafe fn columns(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.columns);
        // SAFETY: `start` lies in row 0, which has as many columns.
        let start = unsafe { self.start.add(range.start) };
        Self { start, stride: self.stride, rows: self.rows, columns: range.len(), values: PhantomData }
    }

    /// The columns of one panel in one row: 16 of them, fewer in the last panel.
    #[inline(always)]
    fn tile(&self, row: usize, panel: usize) -> (*mut f32, usize) {
        assert!(row < self.rows && panel * WIDTH < self.columns);
        let held = WIDTH.min(self.columns - panel * WIDTH);
        // SAFETY: the row and the column are inside, so that the offset is.
        (unsafe { self.start.add(row * self.stride + panel * WIDTH) }, held)
    }

    /// What one panel of a row holds, filled up with zeros.
    #[inline(always)]
    fn load(&self, row: usize, panel: usize) -> [f32; WIDTH] {
        let (from, held) = self.tile(row, panel);
        if held == WIDTH {
            // SAFETY: 16 columns of this row follow, and only this value reads or writes them.
            return unsafe { from.cast::<[f32; WIDTH]>().read() };
        }
        let mut values = [0.0; WIDTH];
        for (i, value) in values[..held].iter_mut().enumerate() {
            // SAFETY: `held` columns of this row follow, and only this value reads or writes them.
            *value = unsafe { from.add(i).read() };
        }
        values
    }

    #[inline(always)]
    fn store(&mut self, row: usize, panel: usize, values: &[f32; WIDTH]) {
        let (to, held) = self.tile(row, panel);
        if held == WIDTH {
            // SAFETY: 16 columns of this row follow, and only this value reads or writes them.
            return unsafe { to.cast::<[f32; WIDTH]>().write(*values) };
        }
        for (i, value) in values[..held].iter().enumerate() {
            // SAFETY: `held` columns of this row follow, and only this value reads or writes them.
            unsafe { to.add(i).write(*value) };
        }
    }
}

/// `out = left * panels^T`, `PANELS` panels at a time where there are many rows.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn multiply<L: Lanes, S: Stored, const PANELS: usize>(
    left: Left<'_>,
    panels: Panels<'_, S>,
    mut out: Out<'_>,
) {
    let count = out.columns.div_ceil(WIDTH);
    let rows = left.values.len() / panels.k;
    // Few rows take more columns at once, to keep as many sums in flight.
    let group = match rows {
        0 => return,
        1 => 4,
        2 | 3 => 2,
        _ => PANELS,
    };
    let whole = count - count % group;
    let mut widened = [[[0.0; WIDTH]; BLOCK]; MOST_PANELS];
    // SAFETY: the caller's promise is the same.
    unsafe {
        for first in (0..whole).step_by(group) {
            match group {
                4 => some_panels::<L, S, 4>(left, panels, first, &mut widened, &mut out),
                2 => some_panels::<L, S, 2>(left, panels, first, &mut widened, &mut out),
                _ => some_panels::<L, S, 1>(left, panels, first, &mut widened, &mut out),
            }
        }
        for first in whole..count {
            some_panels::<L, S, 1>(left, panels, first, &mut widened, &mut out);
        }
    }
}

/// One block of each of some panels, as f32.
type Widened = [[[f32; WIDTH]; BLOCK]; MOST_PANELS];

/// All rows of `N` panels: each block of them is widened once, then all rows run over it.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
unsafe fn some_panels<L: Lanes, S: Stored, const N: usize>(
    left: Left<'_>,
    panels: Panels<'_, S>,
    first: usize,
    widened: &mut Widened,
    out: &mut Out<'_>,
) {
    let k = panels.k;
    let (rows, blocks) = (left.values.len() / k, k.div_ceil(BLOCK));
    for block in 0..blocks {
        let steps = block * BLOCK..k.min((block + 1) * BLOCK);
        let mut scales = [[1.0; WIDTH]; N];
        for n in 0..N {
            let weights = &panels.weights[(first + n) * k..][steps.clone()];
            for (widened, weights) in widened[n].iter_mut().zip(weights) {
                // SAFETY: the caller's promise is the same.
                unsafe { weights.widen::<L>().store(widened) };
            }
            if S::SCALED {
                scales[n] = panels.scales[(first + n) * blocks + block];
            }
        }
        let step = Step { k, steps, block, blocks, first, widened, scales: &scales };
        // SAFETY: the caller's promise is the same.
        unsafe {
            let mut row = 0;
            while row + ROWS <= rows {
                step.tile::<L, S, ROWS>(left, row, out);
                row += ROWS;
            }
            match rows - row {
                1 => step.tile::<L, S, 1>(left, row, out),
                2 => step.tile::<L, S, 2>(left, row, out),
                3 => step.tile::<L, S, 3>(left, row, out),
                4 => step.tile::<L, S, 4>(left, row, out),
                5 => step.tile::<L, S, 5>(left, row, out),
                _ => {}
            }
        }
    }
}

/// One block of `N` panels.
struct Step<'a, const N: usize> {
    k: usize,
    steps: Range<usize>,
    block: usize,
    blocks: usize,
    first: usize,
    widened: &'a Widened,
    scales: &'a [[f32; WIDTH]; N],
}

impl<const N: usize> Step<'_, N> {
    /// Adds the block to `R` rows of the output.
    ///
    /// # Safety
    /// The processor has the instruction set of `L`.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "closures of iterators would not have the instruction set")]
    unsafe fn tile<L: Lanes, S: Stored, const R: usize>(&self, left: Left<'_>, row: usize, out: &mut Out<'_>) {
        let mut x: [&[f32]; R] = [&[]; R];
        for r in 0..R {
            x[r] = &left.values[(row + r) * self.k..][self.steps.clone()];
        }
        let length = self.steps.len();
        // SAFETY: the caller promises the instruction set; `x` and `widened` have `length` steps, `length <= BLOCK`.
        unsafe {
            let mut sums = [[L::splat(0.0); N]; R];
            for step in 0..length {
                let mut columns = [L::splat(0.0); N];
                for n in 0..N {
                    columns[n] = L::load(self.widened[n].get_unchecked(step));
                }
                for r in 0..R {
                    let value = L::splat(*x[r].get_unchecked(step));
                    for n in 0..N {
                        sums[r][n] = sums[r][n].add_product(value, columns[n]);
                    }
                }
            }
            for r in 0..R {
                for n in 0..N {
                    let scale = if S::SCALED {
                        let scale = left.scales.get((row + r) * self.blocks + self.block).copied().unwrap_or(1.0);
                        L::splat(0.0).add_product(L::load(&self.scales[n]), L::splat(scale))
                    } else {
                        L::splat(1.0)
                    };
                    let mut values = [0.0; WIDTH];
                    if self.block > 0 {
                        values = out.load(row + r, self.first + n);
                    }
                    L::load(&values).add_product(sums[r][n], scale).store(&mut values);
                    out.store(row + r, self.first + n, &values);
                }
            }
        }
    }
}
