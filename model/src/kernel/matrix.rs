//! Weight matrices in panels, look-up tables, and the activations that they are multiplied with.

use half::bf16;

use super::gemm::{Left, Out, Panels, Stored};
use super::{Cores, WIDTH};
use crate::fp8::{self, FP8_GROUP, fp8_groups};

/// Stored elements, row-major.
#[derive(Debug)]
pub(crate) enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Values {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val(values.as_slice()),
            Self::Bf16(values) => size_of_val(values.as_slice()),
        }
    }
}

/// Rows that are looked up, `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct Table {
    cols: usize,
    values: Values,
}

impl Table {
    pub(crate) fn new(cols: usize, values: Values) -> Self {
        Self { cols, values }
    }

    /// Copies row `index` to `out` `[cols]`; `false` if there is no such row.
    pub(crate) fn copy_row(&self, index: usize, out: &mut [f32]) -> bool {
        let range = index.saturating_mul(self.cols)..index.saturating_add(1).saturating_mul(self.cols);
        match &self.values {
            Values::F32(w) => w.get(range).map(|row| out.copy_from_slice(row)),
            Values::Bf16(w) => {
                w.get(range).map(|row| out.iter_mut().zip(row).for_each(|(out, value)| *out = value.to_f32()))
            }
        }
        .is_some()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.values.bytes()
    }
}

/// Weights in panels: `[panels, cols]` of 16 rows' weights each, the last panel filled up with zeros.
#[derive(Debug)]
pub(crate) enum Weights {
    F32(Vec<[f32; WIDTH]>),
    Bf16(Vec<[bf16; WIDTH]>),
    /// Codes, and the scales of each panel and block of 128 columns, `[panels, blocks]`.
    Fp8(Vec<[u8; WIDTH]>, Vec<[f32; WIDTH]>),
}

/// A weight matrix `[rows, cols]`, as PyTorch has a linear layer: `[out, in]`.
#[derive(Debug)]
pub(crate) struct Matrix {
    rows: usize,
    cols: usize,
    weights: Weights,
}

/// Rows that are multiplied with weights: as they are, and quantised where FP8 weights take them so.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Activations<'a> {
    /// `[rows, width]`.
    pub(crate) plain: &'a [f32],
    /// The codes' values `[rows, width]` and each group's scale `[rows, groups]`.
    pub(crate) quantised: Option<(&'a [f32], &'a [f32])>,
}

/// Room for quantised rows, kept between calls.
#[derive(Debug, Default)]
pub(crate) struct QuantiseScratch {
    codes: Vec<f32>,
    scales: Vec<f32>,
}

impl QuantiseScratch {
    /// Rows of `width`, quantised if `quantise`.
    pub(crate) fn activations<'a>(&'a mut self, quantise: bool, plain: &'a [f32], width: usize) -> Activations<'a> {
        if !quantise {
            return Activations { plain, quantised: None };
        }
        self.codes.resize(plain.len(), 0.0);
        self.scales.resize(plain.len() / width.max(1) * fp8_groups(width), 0.0);
        fp8::quantise(plain, width, &mut self.scales, &mut self.codes);
        Activations { plain, quantised: Some((&self.codes, &self.scales)) }
    }
}

impl Matrix {
    pub(crate) fn new(rows: usize, cols: usize, weights: Weights) -> Self {
        Self { rows, cols, weights }
    }

    /// Whether its weights are FP8, so that it can take quantised activations.
    pub(crate) fn is_fp8(&self) -> bool {
        matches!(self.weights, Weights::Fp8(..))
    }

    /// `out[rows, self.rows] = x[rows, cols] * self^T`, accumulated in f32 and not rounded.
    pub(crate) fn apply(&self, cores: &Cores, x: Activations<'_>, out: &mut [f32]) {
        if self.cols == 0 {
            out.fill(0.0);
            return;
        }
        let plain = Left { values: x.plain, scales: &[] };
        match &self.weights {
            Weights::F32(weights) => self.multiply(cores, plain, weights, &[], out),
            Weights::Bf16(weights) => self.multiply(cores, plain, weights, &[], out),
            Weights::Fp8(codes, scales) => {
                let quantised = x.quantised.map(|(values, scales)| Left { values, scales });
                self.multiply(cores, quantised.unwrap_or(plain), codes, scales, out);
            }
        }
    }

    fn multiply<S: Stored + Sync>(
        &self,
        cores: &Cores,
        left: Left<'_>,
        weights: &[S],
        scales: &[[f32; WIDTH]],
        out: &mut [f32],
    ) {
        let (k, blocks) = (self.cols, self.cols.div_ceil(FP8_GROUP));
        let rows = left.values.len() / k;
        assert!(out.len() >= rows * self.rows);
        let out = Out::new(out, self.rows);
        let work = rows * self.rows * k;
        cores.share_out(self.rows.div_ceil(WIDTH), work, &|panels| {
            let columns = panels.start * WIDTH..self.rows.min(panels.end * WIDTH);
            let some = Panels {
                weights: &weights[panels.start * k..panels.end * k],
                scales: if S::SCALED { &scales[panels.start * blocks..panels.end * blocks] } else { &[] },
                k,
            };
            // SAFETY: each column is in one range of panels, and each range is worked on by one thread.
            let out = unsafe { out.columns(columns) };
            cores.isa.multiply(left, some, out);
        });
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::F32(weights) => size_of_val(weights.as_slice()),
            Weights::Bf16(weights) => size_of_val(weights.as_slice()),
            Weights::Fp8(codes, scales) => size_of_val(codes.as_slice()) + size_of_val(scales.as_slice()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::noise;
    use super::super::{Cores, Isa};
    use super::*;

    fn panels<T: Copy + Default>(w: &[T], k: usize) -> Vec<[T; WIDTH]> {
        let n = w.len() / k;
        let panel = |panel: usize, i: usize| {
            std::array::from_fn(|lane| w.get((panel * WIDTH + lane) * k + i).copied().unwrap_or_default())
        };
        (0..n.div_ceil(WIDTH)).flat_map(|p| (0..k).map(move |i| (p, i))).map(|(p, i)| panel(p, i)).collect()
    }

    /// FP8 weights: codes `[n, k]`, a scale for each row and block.
    fn fp8_matrix(n: usize, k: usize) -> (Matrix, Vec<f32>) {
        let codes: Vec<u8> = noise(n * k, 2).iter().map(|value| fp8::encode(value * 300.0)).collect();
        let blocks = k.div_ceil(FP8_GROUP);
        let scale = |row: usize, block: usize| 0.001 * (1.0 + row as f32 / 7.0 + block as f32);
        let scales = (0..n.div_ceil(WIDTH) * blocks)
            .map(|i| std::array::from_fn(|lane| scale(i / blocks * WIDTH + lane, i % blocks)));
        let matrix = Matrix::new(n, k, Weights::Fp8(panels(&codes, k), scales.collect()));
        let dequantised = (0..n * k).map(|i| fp8::decode(codes[i]) * scale(i / k, i % k / FP8_GROUP)).collect();
        (matrix, dequantised)
    }

    fn matrices(n: usize, k: usize) -> [(Matrix, Vec<f32>); 3] {
        let wide = noise(n * k, 3);
        let narrow: Vec<bf16> = wide.iter().map(|value| bf16::from_f32(*value)).collect();
        let widened = narrow.iter().map(|value| value.to_f32()).collect();
        [
            (Matrix::new(n, k, Weights::F32(panels(&wide, k))), wide),
            (Matrix::new(n, k, Weights::Bf16(panels(&narrow, k))), widened),
            fp8_matrix(n, k),
        ]
    }

    fn apply(matrix: &Matrix, cores: &Cores, x: &[f32], quantise: bool) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.len() / matrix.cols * matrix.rows];
        let mut scratch = QuantiseScratch::default();
        matrix.apply(cores, scratch.activations(quantise, x, matrix.cols), &mut out);
        out
    }

    fn all_cores() -> Vec<Cores> {
        let mut cores: Vec<Cores> = Isa::available().iter().map(|isa| Cores::with_isa(*isa, 1).unwrap()).collect();
        cores.push(Cores::new(3).unwrap());
        cores
    }

    #[test]
    fn products_are_right_for_every_weight_type_and_instruction_set_at_odd_sizes() {
        for (rows, n, k) in
            [(1, 1, 1), (1, 100, 130), (2, 33, 17), (3, 40, 300), (5, 13, 129), (7, 16, 128), (14, 50, 257)]
        {
            let x = noise(rows * k, 1);
            for (matrix, dequantised) in matrices(n, k) {
                for cores in all_cores() {
                    for (i, found) in apply(&matrix, &cores, &x, false).iter().enumerate() {
                        let (row, col) = (i / n, i % n);
                        let term = |j| f64::from(x[row * k + j]) * f64::from(dequantised[col * k + j]);
                        let (exact, size) =
                            (0..k).fold((0.0, 0.0), |(sum, size), j| (sum + term(j), size + term(j).abs()));
                        assert!(
                            (exact - f64::from(*found)).abs() <= size * 2e-6,
                            "{cores:?} {rows}x{n}x{k}: {exact} {found}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn quantised_products_are_sums_of_codes_times_both_scales() {
        let (rows, n, k) = (7, 21, 200);
        let x = noise(rows * k, 4);
        let (matrix, dequantised) = fp8_matrix(n, k);
        let (mut codes, mut scales) = (vec![0.0; x.len()], vec![0.0; rows * fp8_groups(k)]);
        fp8::quantise(&x, k, &mut scales, &mut codes);
        for cores in all_cores() {
            for (i, found) in apply(&matrix, &cores, &x, true).iter().enumerate() {
                let (row, col) = (i / n, i % n);
                let term = |j| {
                    let scale = f64::from(scales[row * fp8_groups(k) + j / FP8_GROUP]);
                    f64::from(codes[row * k + j]) * scale * f64::from(dequantised[col * k + j])
                };
                let (exact, size) = (0..k).fold((0.0, 0.0), |(sum, size), j| (sum + term(j), size + term(j).abs()));
                assert!((exact - f64::from(*found)).abs() <= size * 2e-6, "{cores:?}: {exact} {found}");
            }
        }
    }

    #[test]
    fn a_row_is_the_same_alone_in_any_batch_and_on_any_number_of_threads() {
        let (rows, n, k) = (15, 85, 300);
        let x = noise(rows * k, 5);
        for (matrix, _) in matrices(n, k) {
            for quantise in [false, true] {
                for cores in all_cores() {
                    let together = apply(&matrix, &cores, &x, quantise);
                    for some in 1..=7 {
                        for first in 0..rows - some {
                            let alone = apply(&matrix, &cores, &x[first * k..(first + some) * k], quantise);
                            assert_eq!(alone, together[first * n..(first + some) * n], "{cores:?} {some} rows");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn wide_instruction_sets_agree_bit_for_bit() {
        let x = noise(9 * 333, 6);
        for (matrix, _) in matrices(50, 333) {
            let fused = all_cores().into_iter().filter(|cores| cores.isa != Isa::Portable);
            let results: Vec<_> = fused.map(|cores| apply(&matrix, &cores, &x, true)).collect();
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
        }
    }

    #[test]
    fn a_matrix_without_columns_gives_zeros() {
        let matrix = Matrix::new(3, 0, Weights::F32(Vec::new()));
        let mut out = [1.0; 6];
        matrix.apply(&Cores::new(1).unwrap(), Activations { plain: &[], quantised: None }, &mut out);
        assert_eq!(out, [0.0; 6]);
    }
}
