//! The one place where payload bytes move, and the choice of how.
//!
//! Where the target's lines are in this core's caches, or in one that it shares with the peer's core, plain stores are
//! fastest: by the C library (`rep movsb`, mostly) where source and target are aligned alike and small, by the vector unit where
//! they are not. Where the lines are elsewhere, because the peer has read the last transfer to the same place and sits apart, plain
//! stores fetch every line before they overwrite it, and non-temporal stores are up to three times as fast; but the reader of a
//! small one then waits for memory instead of a cache. Which is best cannot be known beforehand, and what one copy takes depends on
//! how the one before it went. So of copies of about one size a few go each way now and then, and the others as the best of them.
//! `docs/benchmarks.md` has the figures.

use std::ptr;

/// Bytes of a cache line.
const LINE: usize = 64;

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

/// Copies `len` bytes that a peer has written. Not by `rep movsb`, as the C library does from 2 KiB on: where source and target are
/// not aligned alike, that takes twice as long (14336 B between cores that share a cache: 0.66 and 0.36 µs).
///
/// # Safety
/// As for `ptr::copy_nonoverlapping`.
#[inline]
pub unsafe fn copy_from_peer(source: *const u8, target: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if (streaming::SMALLEST_FETCH..streaming::LARGE).contains(&len) {
        // SAFETY: this function's contract.
        return unsafe { streaming::fetch(source, target, len) };
    }
    // SAFETY: this function's contract.
    unsafe { ptr::copy_nonoverlapping(source, target, len) }
}

/// Has this core take the lines of a range into its cache, to write them soon, and leaves the bytes as they are. (Asking for the
/// lines by `prefetchw` brings nothing where this was measured.)
///
/// # Safety
/// The range is readable and writable, and nobody else writes to it meanwhile.
pub(crate) unsafe fn prepare_write(start: *mut u8, len: usize) {
    for offset in (0..len).step_by(LINE) {
        // SAFETY: this function's contract.
        unsafe {
            let line = start.add(offset);
            line.write_volatile(line.read_volatile());
        }
    }
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
    use super::LINE;
    use std::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_sfence, _mm_storeu_si128, _mm_stream_si128, _rdtsc,
    };
    use std::cell::Cell;
    use std::ptr;
    use std::sync::OnceLock;

    /// Smaller copies are always plain.
    pub(super) const SMALLEST: usize = 4 << 10;
    /// What is smaller than this its reader finds in a cache, unless it was copied past the caches.
    pub(super) const LARGE: usize = 64 << 10;
    /// Smaller ones are fetched plainly.
    pub(super) const SMALLEST_FETCH: usize = 512;
    /// From here on the vector unit's turn is the C library's: what one core's caches do not hold it copies more slowly, a third at 896 KiB,
    /// and a trial may not show it.
    const LARGEST_BY_VECTOR: usize = 512 << 10;
    /// Of so many copies some are trials.
    const PERIOD: u32 = 4096;
    /// Copies that go one way in a row to try it. The first of them leave all slots in the state in which that way leaves them; the
    /// others are timed, and the middle one counts.
    const TRIAL: u32 = 16;
    const TIMED: usize = 9;
    /// How far ahead of the step the source is fetched.
    const AHEAD: usize = 16 * LINE;

    thread_local! {
        /// This thread's copies, by size: each class is of twice the size of the one before it, and the last of all that are larger.
        static EXPERIENCES: [Experience; 16] = const { [const { Experience::none() }; 16] };
    }

    /// A way to copy.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Way {
        /// As the C library does.
        Library,
        /// By loads and stores of the vector unit.
        Vector,
        /// By those, past the caches.
        Past,
    }

    impl Way {
        /// In the order of their trials.
        const ALL: [Self; 3] = [Self::Library, Self::Vector, Self::Past];
    }

    /// Copies that are trials, of a period's.
    const TRIALS: u32 = Way::ALL.len() as u32 * TRIAL;

    /// How copies of about one size go.
    #[derive(Debug)]
    struct Experience {
        /// Since the last trials began.
        copies: Cell<u32>,
        /// How those after the trials go.
        best: Cell<Way>,
        /// What those that were timed took, in ticks a KiB, each way. Sorted when a trial is over.
        took: [Cell<[u64; TIMED]>; Way::ALL.len()],
    }

    impl Experience {
        const fn none() -> Self {
            let took = [const { Cell::new([0; TIMED]) }; Way::ALL.len()];
            Self { copies: Cell::new(0), best: Cell::new(Way::Library), took }
        }

        /// How the next copy goes.
        fn way(&self) -> Way {
            Way::ALL.get((self.copies.get() / TRIAL) as usize).copied().unwrap_or(self.best.get())
        }

        /// Whether it is to be timed.
        fn is_timed(&self) -> bool {
            let copies = self.copies.get();
            copies < TRIALS && copies % TRIAL >= TRIAL - TIMED as u32
        }

        /// A copy is over, which took so long if it was timed. From past the caches its reader fetches it in `fetch` ticks a KiB.
        fn count(&self, len: usize, ticks: u64, fetch: u64) {
            let copies = self.copies.get();
            if self.is_timed() {
                let number = (TRIAL - 1 - copies % TRIAL) as usize;
                let cell = &self.took[(copies / TRIAL) as usize];
                let mut took = cell.get();
                took[number] = ticks * 1024 / len as u64;
                if number == 0 {
                    took.sort_unstable();
                }
                cell.set(took);
                if copies + 1 == TRIALS {
                    self.best.set(self.found_best(fetch));
                }
            }
            self.copies.set(if copies + 1 == PERIOD { 0 } else { copies + 1 });
        }

        /// What the trials found, the first of equals.
        fn found_best(&self, fetch: u64) -> Way {
            let [library, vector, past] = self.took.each_ref().map(|took| took.get()[TIMED / 2]);
            let (near, cached) = if vector < library { (vector, Way::Vector) } else { (library, Way::Library) };
            if past + fetch < near { Way::Past } else { cached }
        }
    }

    /// Copies in the way that was found best.
    ///
    /// # Safety
    /// As for `ptr::copy_nonoverlapping`; at least [`SMALLEST`] bytes.
    pub(super) unsafe fn copy(source: *const u8, target: *mut u8, len: usize) {
        // What is large its reader seldom finds in a cache, and where many follow one another it reads while the next is copied.
        let fetch = if len < LARGE { fetch_ticks() } else { 0 };
        EXPERIENCES.with(|classes| {
            let class = &classes[((len / SMALLEST).max(1).ilog2() as usize).min(classes.len() - 1)];
            // SAFETY: the counter is always there.
            let ticks = || if class.is_timed() { unsafe { _rdtsc() } } else { 0 };
            let before = ticks();
            // SAFETY: the caller's contract.
            unsafe {
                match class.way() {
                    Way::Vector if len >= LARGEST_BY_VECTOR => ptr::copy_nonoverlapping(source, target, len),
                    Way::Library => ptr::copy_nonoverlapping(source, target, len),
                    Way::Vector => aligned::<false>(source, target, len),
                    Way::Past => aligned::<true>(source, target, len),
                }
            }
            let took = ticks().wrapping_sub(before);
            class.count(len, took, fetch);
        });
    }

    /// Copies by whole lines of the target; `PAST` the caches, has all of it in memory before any later store.
    ///
    /// # Safety
    /// As for `ptr::copy_nonoverlapping`.
    unsafe fn aligned<const PAST: bool>(source: *const u8, target: *mut u8, len: usize) {
        let head = target.align_offset(LINE).min(len);
        // SAFETY: the caller's contract, for the first bytes and then for the others, whose target is a multiple of a line's size.
        unsafe {
            ptr::copy_nonoverlapping(source, target, head);
            by_lines::<PAST>(source.add(head), target.add(head), len - head);
            if PAST {
                _mm_sfence();
            }
        }
    }

    /// Copies plainly, by loads and stores of the vector unit.
    ///
    /// # Safety
    /// As for `ptr::copy_nonoverlapping`.
    pub(super) unsafe fn fetch(source: *const u8, target: *mut u8, len: usize) {
        // SAFETY: the caller's contract.
        unsafe { by_lines::<false>(source, target, len) }
    }

    /// # Safety
    /// As for `ptr::copy_nonoverlapping`; `PAST` the caches the target is a multiple of a line's size.
    #[inline]
    unsafe fn by_lines<const PAST: bool>(mut source: *const u8, mut target: *mut u8, mut len: usize) {
        // SAFETY: the caller's contract: never are more than the `len` bytes that are left read or written. Prefetching an
        // address does not access it.
        unsafe {
            while len >= LINE {
                _mm_prefetch::<_MM_HINT_T0>(source.wrapping_add(AHEAD).cast());
                let (from, to) = (source.cast::<__m128i>(), target.cast::<__m128i>());
                let line = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
                for (i, part) in line.into_iter().enumerate() {
                    if PAST {
                        _mm_stream_si128(to.add(i), part);
                    } else {
                        _mm_storeu_si128(to.add(i), part);
                    }
                }
                (source, target, len) = (source.add(LINE), target.add(LINE), len - LINE);
            }
            ptr::copy_nonoverlapping(source, target, len);
        }
    }

    /// What the reader of bytes that went past the caches waits for a KiB of them, in ticks of the time-stamp counter. Measured
    /// once, in about 100 µs.
    pub(super) fn fetch_ticks() -> u64 {
        static TICKS: OnceLock<u64> = OnceLock::new();
        *TICKS.get_or_init(measure)
    }

    fn measure() -> u64 {
        const BYTES: usize = 256 << 10;
        let (mut here, mut there) = (vec![1_u8; BYTES], vec![0; BYTES]);
        let fastest = (0..8).map(|_| {
            // SAFETY: two vectors of that many bytes.
            unsafe {
                aligned::<true>(here.as_ptr(), there.as_mut_ptr(), BYTES);
                let before = _rdtsc();
                ptr::copy_nonoverlapping(there.as_ptr(), here.as_mut_ptr(), BYTES);
                _rdtsc().wrapping_sub(before)
            }
        });
        fastest.min().unwrap_or(0) * 1024 / BYTES as u64
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn copies_by_lines_move_every_byte_and_no_other() {
            let source: Vec<u8> = (0..20_000u32).map(|i| (i * 7 + i / 256) as u8 | 1).collect();
            for (from, to, len) in [(0, 0, 0), (1, 3, 63), (5, 64, 64), (3, 1, 127), (0, 7, 9_999), (11, 0, 16_384)] {
                for copy in [aligned::<false>, aligned::<true>] {
                    let mut target = vec![0; 20_000];
                    // SAFETY: both ranges are inside their vectors.
                    unsafe { copy(source[from..].as_ptr(), target[to..].as_mut_ptr(), len) };
                    assert_eq!(target[to..to + len], source[from..from + len]);
                    assert!(target[..to].iter().chain(&target[to + len..]).all(|byte| *byte == 0));
                }
            }
        }

        #[test]
        fn what_a_peer_has_written_is_copied_to_the_last_byte_and_no_further() {
            let source: Vec<u8> = (0..70_000_u32).map(|i| (i * 7 + i / 256) as u8 | 1).collect();
            for (from, to, len) in
                [(0, 0, 511), (1, 3, 512), (5, 64, 777), (0, 7, 14_336), (3, 1, 65_535), (0, 0, 65_536)]
            {
                let mut target = vec![0; 70_000];
                // SAFETY: both ranges are inside their vectors.
                unsafe { super::super::copy_from_peer(source[from..].as_ptr(), target[to..].as_mut_ptr(), len) };
                assert_eq!(target[to..to + len], source[from..from + len]);
                assert!(target[..to].iter().chain(&target[to + len..]).all(|byte| *byte == 0));
            }
        }

        #[test]
        fn copies_go_the_way_that_trials_find_best() {
            let experience = Experience::none();
            for (took, fetch, best) in [
                ([1000, 1500, 2000], 0, Way::Library),
                ([1500, 1000, 2000], 0, Way::Vector),
                ([2000, 1500, 1000], 0, Way::Past),
                ([1000, 1000, 1000], 0, Way::Library),
                ([2000, 2000, 1000], 999, Way::Past),
                ([2000, 2000, 1000], 1000, Way::Library),
                ([2000, 1900, 1000], 950, Way::Vector),
            ] {
                let mut ways = [0; Way::ALL.len()];
                for copy in 0..PERIOD {
                    let way = experience.way();
                    ways[way as usize] += 1;
                    // The first of each trial, and one that was interrupted, are not what counts.
                    let odd = if copy % TRIAL < 7 || copy % TRIAL >= TRIAL - 2 { 9 } else { 1 };
                    experience.count(LARGE, 64 * odd * took[way as usize], fetch);
                }
                let expected = Way::ALL.map(|way| if way == best { PERIOD - TRIALS + TRIAL } else { TRIAL });
                assert_eq!(ways, expected, "{took:?} and {fetch}");
            }
        }

        #[test]
        fn all_ways_copy_the_same() {
            let source: Vec<u8> = (0..100_000u32).map(|i| (i * 31 + i / 256) as u8).collect();
            for len in [SMALLEST, SMALLEST + 1, LARGE - 1, LARGE, 70_001, 100_000] {
                for _ in 0..TRIALS {
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
    streaming::fetch_ticks();
}
