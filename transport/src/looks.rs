//! Looks at memory that another processor is about to write.

/// What comes between two looks at memory that a peer writes.
///
/// A processor otherwise has several looks under way, each of which takes the line away from the peer that is about to write it. This
/// waits until the last one is over, or on a Zen 5 for a moment ([`std::hint::spin_loop`]). A word there and back with nothing between
/// looks, waiting for each, or with a moment's pause: on a Zen 4, between cores that share a cache, 112, 97 and 112 ns, and between such
/// that do not 510, 435 and 435; on a Zen 5 120, 133 and 105, and 525, 550 and 535. An endpoint of `shm` that polls does this by itself.
#[inline]
pub fn between_looks() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if !is_zen_5() {
        // SAFETY: every x86-64 processor has the instruction.
        unsafe { std::arch::x86_64::_mm_lfence() };
        return;
    }
    std::hint::spin_loop();
}

/// What comes between two polls of an endpoint: as between two looks, but nothing on a Zen 5, where who polls on at once sees an
/// immediate sooner (there and back, builds in turn, together 115 instead of 126 ns, apart 430 instead of 460).
#[inline]
pub(crate) fn between_polls() {
    if !is_zen_5() {
        between_looks();
    }
}

/// Or a later one: told by instructions of which AMD's other processors lack one, and other makers' the other.
#[inline]
fn is_zen_5() -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        is_x86_feature_detected!("avx512vp2intersect") && is_x86_feature_detected!("sse4a")
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        false
    }
}
