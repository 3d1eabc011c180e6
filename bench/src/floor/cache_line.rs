//! A cache line in each direction that two CPUs bounce: no message between them can take less.

use crate::BenchError;
use crate::cpus::Cpus;
use crate::timing::{Timing, measure};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[repr(align(128))]
pub(super) struct Line(pub(super) AtomicU64);

/// The turn after which nobody plays any more.
pub(super) const LAST: u64 = u64::MAX;

/// Round trips.
pub(crate) fn bounce(cpus: Cpus, budget: Duration) -> Result<Timing, BenchError> {
    let [there, back] = [Line(AtomicU64::new(0)), Line(AtomicU64::new(0))];
    let (timing, ()) = cpus.duel(
        |_| {
            let mut turn = 0;
            let timing = measure(budget, || {
                turn += 1;
                there.0.store(turn, Ordering::Release);
                await_turn(&back.0, turn);
                Ok(())
            });
            there.0.store(LAST, Ordering::Release);
            timing
        },
        |_| {
            let mut turn = 0;
            while turn != LAST {
                turn = await_turn(&there.0, turn + 1);
                back.0.store(turn, Ordering::Release);
            }
            Ok(())
        },
    )?;
    Ok(timing)
}

/// Spins until the line holds `turn` or a later one.
pub(super) fn await_turn(line: &AtomicU64, turn: u64) -> u64 {
    loop {
        match line.load(Ordering::Acquire) {
            found if found >= turn => return found,
            _ => std::hint::spin_loop(),
        }
    }
}
