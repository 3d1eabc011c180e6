//! Round trips over a provider: a write-with-immediate there, one of the same size back; or plain writes, of which each
//! side polls the byte that lands last.

use super::Mode;
use super::pair::{End, Pair};
use crate::timing::{Timing, measure};
use crate::{BenchError, Cpus};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;
use stepmesh_transport::between_looks;

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

/// Says that this was the last write.
const LAST_TURN: u8 = u8::MAX;
/// Looks at memory between two at the link.
const LOOKS: usize = 1 << 12;

/// Plays with plain writes for a while.
pub(super) fn play_plain(pair: &mut Pair, cpus: Cpus, bytes: usize, budget: Duration) -> Result<Timing, BenchError> {
    let [of_a, of_b] = pair.ends.each_ref().map(End::memory);
    let ([a_sends, a_gets], [b_sends, b_gets]) = (of_a.flags(bytes)?, of_b.flags(bytes)?);
    // As perftest does, the work is prepared once.
    let (from_a, from_b) = (of_a.write(bytes), of_b.write(bytes));
    a_gets.store(0, Ordering::Release);
    b_gets.store(0, Ordering::Release);
    let [a, b] = &mut pair.ends;
    let (timing, ()) = cpus.duel(
        |over| {
            let mut turn = 0;
            let timing = measure(budget, || {
                turn = (turn + 1) % LAST_TURN;
                a_sends.store(turn, Ordering::Relaxed);
                a.post(&from_a)?;
                await_byte(a, a_gets, over, |found| found == turn).map(drop)
            })?;
            a_sends.store(LAST_TURN, Ordering::Relaxed);
            a.post(&from_a)?;
            await_byte(a, a_gets, over, |found| found == LAST_TURN)?;
            Ok(timing)
        },
        |over| {
            let mut turn = 0;
            while turn != LAST_TURN {
                turn = await_byte(b, b_gets, over, |found| found != turn)?;
                b_sends.store(turn, Ordering::Relaxed);
                b.post(&from_b)?;
            }
            b.attend(over)
        },
    )?;
    Ok(timing)
}

/// Spins until a byte is as wanted.
#[inline]
fn await_byte(
    end: &mut End,
    byte: &AtomicU8,
    over: &AtomicBool,
    wanted: impl Fn(u8) -> bool,
) -> Result<u8, BenchError> {
    loop {
        for _ in 0..LOOKS {
            let found = byte.load(Ordering::Acquire);
            if wanted(found) {
                return Ok(found);
            }
            between_looks();
        }
        end.look(over)?;
    }
}
