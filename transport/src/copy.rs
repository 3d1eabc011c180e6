//! The one place where payload bytes move, and the choice of how.
//!
//! Where the target's lines are in this core's caches, or in one that it shares with the peer's core, plain stores are
//! fastest. Where they are not, because the peer has read the last transfer to the same place and sits apart, plain stores
//! fetch every line before they overwrite it, and non-temporal stores are up to three times as fast. Which it is cannot be
//! known beforehand, and what one copy takes depends on how the one before it went. So of large copies of about one size a few
//! go each way now and then, and the others as the better of the two; a smaller one goes plainly until that is slower than non-temporal
//! stores are on this machine, and by those for a while.
//! `rep movsb` never won; `docs/benchmarks.md` has the figures.

use std::ptr;

/// Copies `len` bytes to where a peer will read them. Bytes that were produced in place (`source == target`) are not touched.
///
/// # Safety
/// `source..source + len` must be readable and `target..target + len` writable; they may overlap.
#[inline]
pub unsafe fn copy_for_peer(source: *const u8, target: *mut u8, len: usize) {
    if ptr::eq(source, target) {
        return;
    }
    if (8..=16).contains(&len) {
        // SAFETY: this function's contract; both reads come before the writes. The two words may share bytes.
        return unsafe {
            let (first, last) = (source.cast::<u64>(), source.add(len - 8).cast::<u64>());
            let words = (first.read_unaligned(), last.read_unaligned());
            target.cast::<u64>().write_unaligned(words.0);
            target.add(len - 8).cast::<u64>().write_unaligned(words.1);
        };
    }
    #[cfg(target_arch = "x86_64")]
    if len >= streaming::SMALLEST && source.addr().abs_diff(target.addr()) >= len {
        // SAFETY: this function's contract, and the ranges were found apart.
        return unsafe { streaming::copy(source, target, len) };
    }
    // SAFETY: this function's contract.
    unsafe { ptr::copy(source, target, len) }
}

/// As [`copy_for_peer`], as many bytes as both slices have; returns how many.
pub fn copy_to_slot(source: &[u8], target: &mut [u8]) -> usize {
    let bytes = source.len().min(target.len());
    // SAFETY: both have so many bytes.
    unsafe { copy_for_peer(source.as_ptr(), target.as_mut_ptr(), bytes) };
    bytes
}

#[cfg(target_arch = "x86_64")]
mod streaming {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_sfence, _mm_stream_si128, _rdtsc,
    };
    use std::cell::Cell;
    use std::ptr;
    use std::sync::OnceLock;

    /// Bytes that are copied plainly to see how that goes: more than the store buffer and the prefetchers' start hide.
    const PROBE: usize = 16 << 10;
    /// Copies of so many bytes go by what was tried.
    const LARGE: usize = 4 * PROBE;
    /// Smaller copies are always plain.
    pub(super) const SMALLEST: usize = 4 << 10;
    /// Smaller copies that go one way before plain stores are tried again.
    const HABIT: u32 = 32;
    /// Of so many large copies some are trials.
    const PERIOD: u32 = 4096;
    /// Copies that go one way in a row to try it. The first of them leave all slots in the state in which that way leaves them; the
    /// others are timed, and the middle one counts.
    const TRIAL: u32 = 16;
    const TIMED: usize = 9;
    /// What takes so many times as long as it should was interrupted, and says nothing.
    const INTERRUPTED: u64 = 16;
    /// Bytes of a step: a cache line.
    const LINE: usize = 64;
    /// How far ahead of the step the source is fetched.
    const AHEAD: usize = 16 * LINE;

    /// Copies in the way that is faster here.
    ///
    /// # Safety
    /// As for `ptr::copy_nonoverlapping`; at least [`SMALLEST`] bytes.
    pub(super) unsafe fn copy(source: *const u8, target: *mut u8, len: usize) {
        let habit = LEFT.get();
        // SAFETY: the caller's contract, for the first bytes and then for the others.
        unsafe {
            if len >= LARGE {
                copy_large(source, target, len);
            } else if habit > 0 {
                LEFT.set(habit - 1);
                stream(source, target, len);
            } else if timed(source, target, len) == Fared::Slowly {
                LEFT.set(HABIT);
            }
        }
    }

    thread_local! {
        /// Smaller copies of this thread that will go past the caches.
        static LEFT: Cell<u32> = const { Cell::new(0) };
        /// Large ones, by size: each class is of twice the size of the one before it, and the last of all that are larger.
        static LARGE_ONES: [Cell<Experience>; 12] = const { [const { Cell::new(Experience::NONE) }; 12] };
    }

    /// How large copies of about one size go.
    #[derive(Clone, Copy, Debug)]
    struct Experience {
        /// Since the last trials began.
        copies: u32,
        /// What those that were timed took, in ticks a KiB: plainly, and past the caches. Sorted when a trial is over.
        took: [[u64; TIMED]; 2],
    }

    impl Experience {
        const NONE: Self = Self { copies: 0, took: [[0; TIMED]; 2] };

        /// Whether the next copy goes past the caches.
        fn streams(&self) -> bool {
            match self.copies / TRIAL {
                0 => false,
                1 => true,
                _ => self.took[1][TIMED / 2] < self.took[0][TIMED / 2],
            }
        }

        /// Whether it is to be timed.
        fn is_timed(&self) -> bool {
            self.copies < 2 * TRIAL && self.copies % TRIAL >= TRIAL - TIMED as u32
        }

        /// A copy is over, which took so long if it was timed.
        fn count(&mut self, len: usize, ticks: u64) {
            if self.is_timed() {
                let number = (TRIAL - 1 - self.copies % TRIAL) as usize;
                let took = &mut self.took[usize::from(self.streams())];
                took[number] = ticks * 1024 / len as u64;
                if number == 0 {
                    took.sort_unstable();
                }
            }
            self.copies += 1;
            if self.copies == PERIOD {
                *self = Self::NONE;
            }
        }
    }

    /// Copies in the way that was found better.
    ///
    /// # Safety
    /// As for `ptr::copy_nonoverlapping`.
    unsafe fn copy_large(source: *const u8, target: *mut u8, len: usize) {
        LARGE_ONES.with(|classes| {
            let class = &classes[((len / LARGE).max(1).ilog2() as usize).min(classes.len() - 1)];
            let mut experience = class.get();
            // SAFETY: the counter is always there.
            let ticks = || if experience.is_timed() { unsafe { _rdtsc() } } else { 0 };
            let before = ticks();
            // SAFETY: the caller's contract.
            unsafe {
                if experience.streams() {
                    stream(source, target, len);
                } else {
                    ptr::copy_nonoverlapping(source, target, len);
                }
            }
            let took = ticks().wrapping_sub(before);
            experience.count(len, took);
            class.set(experience);
        });
    }

    #[derive(PartialEq)]
    enum Fared {
        Well,
        Slowly,
        Interrupted,
    }

    /// Copies plainly, and says how that went.
    ///
    /// # Safety
    /// As for `ptr::copy_nonoverlapping`.
    unsafe fn timed(source: *const u8, target: *mut u8, len: usize) -> Fared {
        let limit = limit_ticks() * len as u64 / PROBE as u64;
        // SAFETY: the caller's contract; the counter is always there.
        let took = unsafe {
            let before = _rdtsc();
            ptr::copy_nonoverlapping(source, target, len);
            _rdtsc().wrapping_sub(before)
        };
        match took {
            _ if took <= limit => Fared::Well,
            _ if took > limit.saturating_mul(INTERRUPTED) => Fared::Interrupted,
            _ => Fared::Slowly,
        }
    }

    /// Copies past the caches, and has all of it in memory before any later store.
    ///
    /// # Safety
    /// As for `ptr::copy_nonoverlapping`.
    unsafe fn stream(mut source: *const u8, mut target: *mut u8, mut len: usize) {
        let head = target.align_offset(LINE).min(len);
        // SAFETY: the caller's contract: never are more than the `len` bytes that are left read or written. A line is
        // stored at a multiple of its size. Prefetching an address does not access it.
        unsafe {
            ptr::copy_nonoverlapping(source, target, head);
            (source, target, len) = (source.add(head), target.add(head), len - head);
            while len >= LINE {
                _mm_prefetch::<_MM_HINT_T0>(source.wrapping_add(AHEAD).cast());
                let (from, to) = (source.cast::<__m128i>(), target.cast::<__m128i>());
                let line = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
                for (i, part) in line.into_iter().enumerate() {
                    _mm_stream_si128(to.add(i), part);
                }
                (source, target, len) = (source.add(LINE), target.add(LINE), len - LINE);
            }
            ptr::copy_nonoverlapping(source, target, len);
            _mm_sfence();
        }
    }

    /// How long plain stores may take for [`PROBE`] bytes before non-temporal ones are better: half as long again as those
    /// take, in ticks of the time-stamp counter. Measured once, in about 100 µs.
    pub(super) fn limit_ticks() -> u64 {
        static LIMIT: OnceLock<u64> = OnceLock::new();
        *LIMIT.get_or_init(measure)
    }

    fn measure() -> u64 {
        const BYTES: usize = 16 * PROBE;
        let (source, mut target) = (vec![1; BYTES], vec![0; BYTES]);
        let fastest = (0..8).map(|_| {
            // SAFETY: two vectors of that many bytes.
            unsafe {
                let before = _rdtsc();
                stream(source.as_ptr(), target.as_mut_ptr(), BYTES);
                _rdtsc().wrapping_sub(before)
            }
        });
        let ticks = fastest.min().unwrap_or(0) * PROBE as u64 / BYTES as u64;
        ticks + ticks / 2
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn streaming_copies_every_byte_and_no_other() {
            let source: Vec<u8> = (0..20_000u32).map(|i| (i * 7 + i / 256) as u8 | 1).collect();
            for (from, to, len) in [(0, 0, 0), (1, 3, 63), (5, 64, 64), (3, 1, 127), (0, 7, 9_999), (11, 0, 16_384)] {
                let mut target = vec![0; 20_000];
                // SAFETY: both ranges are inside their vectors.
                unsafe { stream(source[from..].as_ptr(), target[to..].as_mut_ptr(), len) };
                assert_eq!(target[to..to + len], source[from..from + len]);
                assert!(target[..to].iter().chain(&target[to + len..]).all(|byte| *byte == 0));
            }
        }

        #[test]
        fn large_copies_go_the_way_that_trials_find_better() {
            let mut experience = Experience::NONE;
            for (plain_ticks, stream_ticks) in [(1000, 2000), (2000, 1000), (1000, 1000)] {
                let mut streamed = 0;
                for copy in 0..PERIOD {
                    let streams = experience.streams();
                    streamed += u32::from(streams);
                    // The first of each trial, and one that was interrupted, are not what counts.
                    let odd = if copy % TRIAL < 7 || copy % TRIAL >= TRIAL - 2 { 9 } else { 1 };
                    experience.count(LARGE, 64 * odd * if streams { stream_ticks } else { plain_ticks });
                }
                let expected = if stream_ticks < plain_ticks { PERIOD - TRIAL } else { TRIAL };
                assert_eq!(streamed, expected, "{plain_ticks} against {stream_ticks}");
            }
        }

        #[test]
        fn both_ways_copy_the_same() {
            let source: Vec<u8> = (0..100_000u32).map(|i| (i * 31 + i / 256) as u8).collect();
            for len in [SMALLEST, SMALLEST + 1, LARGE - 1, LARGE, 70_001, 100_000] {
                for habit in [0, 1] {
                    LEFT.set(habit);
                    let mut target = vec![0; len];
                    // SAFETY: both vectors have so many bytes.
                    unsafe { copy(source.as_ptr(), target.as_mut_ptr(), len) };
                    assert_eq!(target, source[..len]);
                }
            }
        }
    }
}

/// Learns what this machine is good at, so that no transfer has to.
pub(crate) fn prepare() {
    #[cfg(target_arch = "x86_64")]
    streaming::limit_ticks();
}
