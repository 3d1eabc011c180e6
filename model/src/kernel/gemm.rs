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
/// Rows whose part of a block is kept together: 66 KiB, which stays in the second cache. Whole tiles.
const MOST_ROWS: usize = 22 * ROWS;
/// Panels that are worked on together at most.
const MOST_PANELS: usize = 4;
/// Panels that meet the same block of many rows in turn. A multiple of what is worked on together.
const ROUND: usize = 16;

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
    ///
    /// # Safety
    /// The processor has the instruction set of `L`.
    #[inline(always)]
    unsafe fn load<L: Lanes>(&self, row: usize, panel: usize) -> L {
        let (from, held) = self.tile(row, panel);
        let mut values = [0.0; WIDTH];
        // SAFETY: `held` columns of this row follow, 16 of them in the first case, and only this value uses them. The
        // caller promises the instruction set.
        unsafe {
            if held == WIDTH {
                return L::load(&*from.cast());
            }
            for (i, value) in values[..held].iter_mut().enumerate() {
                *value = from.add(i).read();
            }
            L::load(&values)
        }
    }

    /// # Safety
    /// The processor has the instruction set of `L`.
    #[inline(always)]
    unsafe fn store<L: Lanes>(&mut self, row: usize, panel: usize, lanes: L) {
        let (to, held) = self.tile(row, panel);
        let mut values = [0.0; WIDTH];
        // SAFETY: `held` columns of this row follow, 16 of them in the first case, and only this value uses them. The
        // caller promises the instruction set.
        unsafe {
            if held == WIDTH {
                return lanes.store(&mut *to.cast());
            }
            lanes.store(&mut values);
            for (i, value) in values[..held].iter().enumerate() {
                to.add(i).write(*value);
            }
        }
    }
}

/// `out = left * panels^T`, `PANELS` panels at a time where there are many rows.
///
/// Of many rows, a block of them, which stays in the second cache, meets a block of panel after panel, which stays in the
/// first; few rows go along the panels as these lie in memory.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn multiply<L: Lanes, S: Stored, const PANELS: usize>(
    left: Left<'_>,
    panels: Panels<'_, S>,
    mut out: Out<'_>,
) {
    let (count, blocks) = (out.columns.div_ceil(WIDTH), panels.k.div_ceil(BLOCK));
    let rows = left.values.len() / panels.k;
    // Few rows take more columns at once, to keep as many sums in flight.
    let group = match rows {
        0 => return,
        1 => 4,
        2 | 3 => 2,
        _ => PANELS,
    };
    let round = if rows < ROWS { group } else { ROUND };
    let mut work = Work { rows: [[0.0; BLOCK]; MOST_ROWS], panels: [[[0.0; WIDTH]; BLOCK]; MOST_PANELS] };
    for first_row in (0..rows).step_by(MOST_ROWS) {
        let some_rows = first_row..rows.min(first_row + MOST_ROWS);
        for round in (0..count).step_by(round).map(|first| first..count.min(first + round)) {
            for block in 0..blocks {
                let steps = block * BLOCK..panels.k.min((block + 1) * BLOCK);
                for (to, row) in work.rows.iter_mut().zip(some_rows.clone()) {
                    to[..steps.len()].copy_from_slice(&left.values[row * panels.k..][steps.clone()]);
                }
                let step = Step { left, panels, rows: some_rows.clone(), steps, block, blocks };
                let whole = round.start + round.len() / group * group;
                // SAFETY: the caller's promise is the same.
                unsafe {
                    for first in (round.start..whole).step_by(group) {
                        match group {
                            4 => step.some_panels::<L, 4>(first, &mut work, &mut out),
                            2 => step.some_panels::<L, 2>(first, &mut work, &mut out),
                            _ => step.some_panels::<L, 1>(first, &mut work, &mut out),
                        }
                    }
                    for first in whole..round.end {
                        step.some_panels::<L, 1>(first, &mut work, &mut out);
                    }
                }
            }
        }
    }
}

/// One block of some rows, and of some panels as f32.
struct Work {
    rows: [[f32; BLOCK]; MOST_ROWS],
    panels: [[[f32; WIDTH]; BLOCK]; MOST_PANELS],
}

/// Some rows and one block of the shared dimension.
struct Step<'a, S> {
    left: Left<'a>,
    panels: Panels<'a, S>,
    rows: Range<usize>,
    steps: Range<usize>,
    block: usize,
    blocks: usize,
}

impl<S: Stored> Step<'_, S> {
    /// All rows of `N` panels: the block of these is widened once, then all rows run over it.
    ///
    /// # Safety
    /// The processor has the instruction set of `L`.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "closures of iterators would not have the instruction set")]
    unsafe fn some_panels<L: Lanes, const N: usize>(&self, first: usize, work: &mut Work, out: &mut Out<'_>) {
        let mut scales = [[1.0; WIDTH]; N];
        for n in 0..N {
            let weights = &self.panels.weights[(first + n) * self.panels.k..][self.steps.clone()];
            for (widened, weights) in work.panels[n].iter_mut().zip(weights) {
                // SAFETY: the caller's promise is the same.
                unsafe { weights.widen::<L>().store(widened) };
            }
            if S::SCALED {
                scales[n] = self.panels.scales[(first + n) * self.blocks + self.block];
            }
        }
        let rows = self.rows.len();
        // SAFETY: the caller's promise is the same.
        unsafe {
            let mut row = 0;
            while row + ROWS <= rows {
                self.tile::<L, ROWS, N>(row, first, &scales, work, out);
                row += ROWS;
            }
            match rows - row {
                1 => self.tile::<L, 1, N>(row, first, &scales, work, out),
                2 => self.tile::<L, 2, N>(row, first, &scales, work, out),
                3 => self.tile::<L, 3, N>(row, first, &scales, work, out),
                4 => self.tile::<L, 4, N>(row, first, &scales, work, out),
                5 => self.tile::<L, 5, N>(row, first, &scales, work, out),
                _ => {}
            }
        }
    }

    /// Adds the block to `R` rows of `N` panels of the output.
    ///
    /// # Safety
    /// The processor has the instruction set of `L`.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "closures of iterators would not have the instruction set")]
    unsafe fn tile<L: Lanes, const R: usize, const N: usize>(
        &self,
        row: usize,
        first: usize,
        scales: &[[f32; WIDTH]; N],
        work: &Work,
        out: &mut Out<'_>,
    ) {
        let x: &[[f32; BLOCK]] = &work.rows[row..row + R];
        let length = self.steps.len();
        // SAFETY: the caller promises the instruction set; `x` has `R` rows, which have `BLOCK` steps as the panels do,
        // and `length <= BLOCK`.
        unsafe {
            let mut sums = [[L::splat(0.0); N]; R];
            for step in 0..length {
                let mut columns = [L::splat(0.0); N];
                for n in 0..N {
                    columns[n] = L::load(work.panels[n].get_unchecked(step));
                }
                for r in 0..R {
                    let value = L::splat(*x.get_unchecked(r).get_unchecked(step));
                    for n in 0..N {
                        sums[r][n] = sums[r][n].add_product(value, columns[n]);
                    }
                }
            }
            for r in 0..R {
                let row = self.rows.start + row + r;
                for n in 0..N {
                    let scale = if S::SCALED {
                        let scale = self.left.scales.get(row * self.blocks + self.block).copied().unwrap_or(1.0);
                        L::splat(0.0).add_product(L::load(&scales[n]), L::splat(scale))
                    } else {
                        L::splat(1.0)
                    };
                    let before = if self.block > 0 { out.load::<L>(row, first + n) } else { L::splat(0.0) };
                    out.store(row, first + n, before.add_product(sums[r][n], scale));
                }
            }
        }
    }
}
