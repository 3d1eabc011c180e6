//! Streams over a provider: transfers one after the other into a window of places, in one direction or in both.
//!
//! The receiver gives places back half a window at a time, and times each half.

use super::Mode;
use super::pair::{End, Pair, window};
use crate::timing::{Times, Timing};
use crate::{BenchError, Cpus};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use stepmesh_transport::Provider;

const TRANSFER: u32 = 0;
const PLACES: u32 = 1;
const LAST: u32 = 2;
/// How long an end that rests may not see that the other one is over.
const REST: Duration = Duration::from_millis(1);

/// Streams for a while; the times of one transfer, of each direction.
pub(super) fn flow(
    pair: &mut Pair,
    cpus: Cpus,
    bytes: usize,
    both: bool,
    budget: Duration,
) -> Result<Vec<Timing>, BenchError> {
    // The receiver of `ib_write_bw` does not look either, and a device in software needs the CPU.
    let rests = pair.provider == Provider::Verbs && !both;
    let [a, b] = &mut pair.ends;
    let (back, there) = cpus.duel(
        |over| Flow::new(a, bytes, true, false)?.run(Some((budget, both)), over),
        |over| {
            let times = Flow::new(b, bytes, both, rests)?.run(None, over)?;
            b.attend(over)?;
            Ok(times)
        },
    )?;
    Ok(if both { vec![there.timing(), back.timing()] } else { vec![there.timing()] })
}

/// One end of it.
struct Flow<'a> {
    end: &'a mut End,
    bytes: usize,
    window: usize,
    sends: bool,
    /// It waits for what comes, instead of looking.
    rests: bool,
    sent: usize,
    free: usize,
    received: usize,
    half_since: Option<Instant>,
    times: Times,
}

impl<'a> Flow<'a> {
    fn new(end: &'a mut End, bytes: usize, sends: bool, rests: bool) -> Result<Self, BenchError> {
        let window = window(bytes);
        let times = Times::new()?;
        Ok(Self { end, bytes, window, sends, rests, sent: 0, free: window, received: 0, half_since: None, times })
    }

    /// Flows for the time that is given, and longer until there is something to take a median of, in both directions if
    /// the peer sends, too; or until the peer has had enough.
    fn run(mut self, limit: Option<(Duration, bool)>, over: &AtomicBool) -> Result<Times, BenchError> {
        let few = 4 * self.window;
        let start = Instant::now();
        let mut said_last = false;
        loop {
            if self.sends && !said_last && self.free > 0 {
                self.end.send(Mode::Copy, self.bytes, self.sent % self.window * self.bytes, TRANSFER)?;
                self.sent += 1;
                self.free -= 1;
            }
            match self.end.look(over)? {
                Some(LAST) => {
                    if !said_last {
                        self.end.notify(LAST)?;
                    }
                    return Ok(self.times);
                }
                Some(PLACES) => self.free += self.window / 2,
                Some(_) => self.take(said_last)?,
                None if self.rests => self.end.rest(REST)?,
                None => std::hint::spin_loop(),
            }
            let is_enough = |(budget, both): (Duration, bool)| {
                self.sent >= few && (self.received >= few || !both) && start.elapsed() > budget
            };
            if !said_last && limit.is_some_and(is_enough) {
                self.end.notify(LAST)?;
                said_last = true;
            }
        }
    }

    /// One transfer has come. Behind the last word nothing more is said, so that nothing is left on its way.
    fn take(&mut self, said_last: bool) -> Result<(), BenchError> {
        self.received += 1;
        let half = self.window / 2;
        if self.received.is_multiple_of(half) {
            let now = Instant::now();
            if let Some(since) = self.half_since.replace(now) {
                self.times.record(now - since, half as u32);
            }
            if !said_last {
                self.end.notify(PLACES)?;
            }
        }
        Ok(())
    }
}
