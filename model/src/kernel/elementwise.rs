//! Norms, rotary embedding, softmax and activation: one row or one element at a time, in one fixed order.

use super::WIDTH;
use crate::Dtype;

/// RMS norm of every row of `x` into `out`: `weight * x / sqrt(mean(x^2) + eps)`, the quotient in f32, rounded before
/// and after the weight.
pub(crate) fn rms_norm(dtype: Dtype, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len().max(1);
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let scale = 1.0 / (lane_sum(x, |value| value * value) / width as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = dtype.round(dtype.round(x * scale) * weight);
        }
    }
}

/// Rotary embedding of one head in place (rotate-half: pairs `i` and `i + d/2`); `cos` and `sin` are `[d/2]`.
pub(crate) fn rotate(dtype: Dtype, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(head.len() / 2);
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (x, y) = (*a, *b);
        *a = dtype.round(dtype.round(x * cos) - dtype.round(y * sin));
        *b = dtype.round(dtype.round(y * cos) + dtype.round(x * sin));
    }
}

/// A softmax over scores that come piece by piece.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Softmax {
    max: f32,
    /// Of what replaced the scores, as far as they have come.
    pub(crate) sum: f32,
}

impl Softmax {
    /// Before the first piece.
    pub(crate) const NEW: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Replaces `scores` by `exp(scale * score - max)` for the largest so far. Returns what all that came before is to be
    /// multiplied with, as it was relative to the largest before.
    pub(crate) fn go_on(&mut self, scores: &mut [f32], scale: f32) -> f32 {
        let max = scores.iter().fold(self.max, |max, score| max.max(score * scale));
        let before = exp(self.max - max);
        scores.iter_mut().for_each(|score| *score = exp(*score * scale - max));
        *self = Self { max, sum: self.sum * before + lane_sum(scores, |value| value) };
        before
    }
}

/// `gate = silu(gate) * up`, rounded after each step.
pub(crate) fn silu_times(dtype: Dtype, gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = dtype.round(dtype.round(*gate / (1.0 + exp(-*gate))) * up);
    }
}

/// The sum of `term` over a row, 16 lanes at a time.
fn lane_sum(row: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; WIDTH];
    let (whole, rest) = row.as_chunks::<WIDTH>();
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += term(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += term(*value);
    }
    let mut half = WIDTH / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `e^x` to about 1e-7 relative, branch-free so that a loop over it vectorises; saturates at e^±87, keeps NaN.
///
/// `x = n ln 2 + r` with `n` rounded by adding and taking away 1.5 * 2^23; `e^r` by the Cephes polynomial; `2^n` by
/// placing `n` in the exponent.
#[inline]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > 87.0 { 87.0 } else { x };
    let underflows = x < -87.0;
    let x = if underflows { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
        p = p * r + coefficient;
    }
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let value = (p * (r * r) + r + 1.0) * scale;
    if underflows { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_softmax_in_pieces_is_that_of_the_whole() {
        let scores = [3.0, -1.0, 0.5, 7.0, 6.5, -20.0, 7.5];
        let mut whole = scores;
        let mut all = Softmax::NEW;
        all.go_on(&mut whole, 0.5);
        let mut pieces = Softmax::NEW;
        let mut parts: Vec<f32> = Vec::new();
        for piece in scores.chunks(3) {
            let mut piece = piece.to_vec();
            let before = pieces.go_on(&mut piece, 0.5);
            parts.iter_mut().for_each(|part| *part *= before);
            parts.extend(piece);
        }
        for (part, whole) in parts.iter().zip(whole) {
            assert!((part / pieces.sum - whole / all.sum).abs() < 1e-7);
        }
    }

    #[test]
    fn the_exponential_is_right_to_a_few_units_in_the_last_place() {
        for i in -87_000..=87_000 {
            let x = i as f32 / 1000.0;
            let (exact, found) = (f64::from(x).exp(), f64::from(exp(x)));
            assert!((exact - found).abs() <= exact * 3e-7, "{x}: {exact:e} {found:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::INFINITY).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }
}
