//! `memcpy` into shared memory: within the caches, and between places that no cache holds.

use crate::BenchError;
use crate::cpus::Cpus;
use crate::timing::{Times, Timing};
use crate::transport::{End, window};
use std::time::{Duration, Instant};
use stepmesh_transport::{Access, Region};

/// More than the caches of any CPU's core and most of what it shares.
const COLD_BYTES: usize = 96 << 20;

/// From one end's source to the peer's mapped memory: into a window of places as a stream does, or always to the first
/// as a round trip does. One end copies, or both at once; the times of one copy, of each.
pub(crate) fn copies(
    ends: &[End; 2],
    cpus: Cpus,
    bytes: usize,
    places: Places,
    both: bool,
    budget: Duration,
) -> Result<Vec<Timing>, BenchError> {
    let count = match places {
        Places::One => 1,
        Places::Window => window(bytes),
    };
    let [a, b] = ends.each_ref().map(|end| (end.source.clone(), end.target.mapped.clone()));
    let run = |(source, target): (Region, Option<Region>)| {
        target.map(|target| copy(&source, &target, bytes, 1, count, budget)).transpose()
    };
    let (a, b) = cpus.duel(|_| run(a), |_| if both { run(b) } else { Ok(None) })?;
    Ok(a.into_iter().chain(b).collect())
}

/// Where the copies go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Places {
    /// Always the same place.
    One,
    /// One after the other.
    Window,
}

/// Two regions that are larger than the caches.
pub(crate) struct Arena {
    source: Region,
    target: Region,
}

impl Arena {
    /// Of the memory that the ends use.
    pub(crate) fn allocate(end: &End) -> Result<Self, BenchError> {
        let source = end.allocate(COLD_BYTES, Access::Local)?;
        Ok(Self { source, target: end.allocate(COLD_BYTES, Access::PeerWrite)? })
    }

    /// Copies from place to place, none of them met before.
    pub(crate) fn copies(&self, cpus: Cpus, bytes: usize, budget: Duration) -> Result<Timing, BenchError> {
        let places = COLD_BYTES / bytes.max(1);
        let (timing, ()) =
            cpus.duel(|_| copy(&self.source, &self.target, bytes, places, places, budget), |_| Ok(()))?;
        Ok(timing)
    }
}

/// Copies from `from` places in turn to `to` places in turn.
fn copy(
    source: &Region,
    target: &Region,
    bytes: usize,
    from: usize,
    to: usize,
    budget: Duration,
) -> Result<Timing, BenchError> {
    let (source, target) = (source.at(0..from * bytes)?, target.at(0..to * bytes)?);
    let mut times = Times::new()?;
    // Small copies are timed many at once.
    let together = ((4 << 10) / bytes.max(1)).clamp(1, 64) as u32;
    let start = Instant::now();
    let mut before = start;
    let mut number = 0;
    while before - start < budget {
        for _ in 0..together {
            // SAFETY: both ranges were checked to lie in their regions, of which the second is writable here, and the
            // regions are different memory; that nobody writes them now is the measurement's order.
            unsafe {
                let (source, target) = (source.add(number % from * bytes), target.add(number % to * bytes));
                std::ptr::copy_nonoverlapping(source.as_ptr(), target.as_ptr(), std::hint::black_box(bytes));
            }
            number += 1;
        }
        let after = Instant::now();
        times.record(after - before, together);
        before = after;
    }
    Ok(times.timing())
}
