//! Executors in turn, each by a clock of its own: a discrete-event simulation of the code that ships.
//!
//! A side that computes moves its own clock only, so that the sides compute at the same time though they run one after the
//! other. Whose clock is behind goes on, so nobody ever misses what the other has sent before; who has nothing to do waits
//! for the next arrival, or until the other has caught up.

use super::wire::Wire;
use crate::BenchError;
use std::time::Duration;
use stepmesh_pipeline::{AttentionExecutor, FfnExecutor, Step};
use stepmesh_transport::Clock;
use stepmesh_transport::mem::Fabric;

/// Time passes by so much while nobody has anything to do.
const TICK_NS: u64 = 1_000;
/// Turns of one call.
const TURNS: usize = 64;

/// See the module.
pub(super) struct Turns {
    pub(super) fabric: Fabric,
    pub(super) wire: Wire,
    pub(super) clocks: [Clock; 2],
    pub(super) attends: AttentionExecutor,
    pub(super) serves: FfnExecutor,
}

impl Turns {
    /// A few turns.
    pub(super) fn go_on(&mut self) -> Result<(), BenchError> {
        (0..TURNS).try_for_each(|_| self.turn())
    }

    fn turn(&mut self) -> Result<(), BenchError> {
        let [attention_ns, ffn_ns] = self.clocks.each_ref().map(Clock::now_ns);
        let (end, own_ns, other_ns) =
            if attention_ns <= ffn_ns { (0, attention_ns, ffn_ns) } else { (1, ffn_ns, attention_ns) };
        let step = if end == 0 { self.attends.poll()? } else { self.serves.poll()? };
        // What was posted is there at once: the wire holds it back.
        while self.fabric.next_event().is_some() {
            self.fabric.advance_to_next();
        }
        if step != Step::Worked && self.clocks[end].now_ns() == own_ns {
            let arrival_ns = self.wire.next_arrival_ns(end).unwrap_or(u64::MAX);
            let until_ns = arrival_ns.min(other_ns.max(own_ns + TICK_NS)).max(own_ns + 1);
            self.clocks[end].advance(Duration::from_nanos(until_ns - own_ns));
        }
        Ok(())
    }
}
