//! What the processor multiplies and adds at most: fused multiply-adds on registers alone.

use crate::BenchError;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Chains in flight: more than an operation's latency times the units that work on it, fewer than there are registers.
const CHAINS: usize = 12;
/// Operations of a chain between two looks at the clock.
const STEPS: usize = 20_000;

/// Floating-point operations a second, of `threads` threads at once, over `time`.
pub(crate) fn fma_peak(threads: usize, time: Duration) -> Result<f64, BenchError> {
    let started = Instant::now();
    let rates = std::thread::scope(|scope| {
        let work = || {
            let (began, mut operations) = (Instant::now(), 0);
            while started.elapsed() < time {
                operations += chains();
            }
            operations as f64 / began.elapsed().as_secs_f64()
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| BenchError::Thread)).collect::<Result<Vec<_>, _>>()
    })?;
    Ok(rates.iter().sum())
}

/// Runs the chains once on the widest registers; returns the floating-point operations done.
fn chains() -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has what the function is compiled for.
            return unsafe { x86::avx512() };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has what the function is compiled for.
            return unsafe { x86::avx2() };
        }
    }
    let mut sums = black_box([[1.0_f32; 4]; CHAINS]);
    for _ in 0..STEPS {
        sums.iter_mut().flatten().for_each(|sum| *sum = *sum * 0.5 + 0.25);
    }
    black_box(sums);
    2 * 4 * CHAINS * STEPS
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHAINS, STEPS, black_box};
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps, _mm512_fmadd_ps, _mm512_set1_ps};

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512() -> usize {
        let (factor, more) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        let mut sums = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, more);
            }
        }
        black_box(sums);
        2 * 16 * CHAINS * STEPS
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2() -> usize {
        let (factor, more) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
        let mut sums = [_mm256_set1_ps(1.0); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, more);
            }
        }
        black_box(sums);
        2 * 8 * CHAINS * STEPS
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_threads_do_something() {
        let rate = super::fma_peak(2, std::time::Duration::from_millis(5)).unwrap();
        assert!(rate > 0.0 && rate.is_finite());
    }
}
