//! Round trips over a provider: a write-with-immediate there, one of the same size back.

use super::Mode;
use super::pair::Pair;
use crate::timing::{Timing, measure};
use crate::{BenchError, Cpus};
use std::time::Duration;

const STROKE: u32 = 0;
const LAST: u32 = 1;

/// Plays for a while.
pub(super) fn play(
    pair: &mut Pair,
    cpus: Cpus,
    mode: Mode,
    bytes: usize,
    budget: Duration,
) -> Result<Timing, BenchError> {
    let [a, b] = &mut pair.ends;
    let (timing, ()) = cpus.duel(
        |over| {
            let timing = measure(budget, || {
                a.send(mode, bytes, 0, STROKE)?;
                a.receive(over).map(drop)
            })?;
            a.send(mode, bytes, 0, LAST)?;
            a.receive(over)?;
            Ok(timing)
        },
        |over| {
            loop {
                let stroke = b.receive(over)?;
                b.send(mode, bytes, 0, stroke)?;
                if stroke == LAST {
                    return b.attend(over);
                }
            }
        },
    )?;
    Ok(timing)
}
