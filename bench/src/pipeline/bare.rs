//! The same stages and the same wire with nothing of ours between them: two threads that tell each other by words in memory.
//! What they take beyond what the stages allow, the machine takes.

use super::stages::{compute, sleeps};
use super::world::WARM_UP;
use crate::{BenchError, Cpus, Scheduling};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use stepmesh_pipeline::Stages;
use stepmesh_transport::Clock;

/// One microbatch in one direction: how often it was posted, and when last. Apart from its neighbours.
#[derive(Default)]
#[repr(align(128))]
struct Post {
    count: AtomicU64,
    posted_ns: AtomicU64,
}

impl Post {
    fn post(&self, count: u64, clock: &Clock) {
        self.posted_ns.store(clock.now_ns(), Ordering::Relaxed);
        self.count.store(count, Ordering::Release);
    }

    /// Waits until it was posted so often and has been under way for so long.
    fn arrive(&self, count: u64, latency: Duration, clock: &Clock, over: &AtomicBool) -> Result<(), BenchError> {
        loop {
            // Looked at first: what the other end posted before it left is there then.
            let is_over = over.load(Ordering::Acquire);
            if self.count.load(Ordering::Acquire) >= count {
                break;
            }
            if is_over {
                return Err(BenchError::Stopped);
            }
            std::hint::spin_loop();
        }
        let due_ns = self.posted_ns.load(Ordering::Relaxed) + latency.as_nanos() as u64;
        while clock.now_ns() < due_ns {
            std::hint::spin_loop();
        }
        Ok(())
    }
}

/// The mean time of so many tokens behind the first few, as of a run.
pub(super) fn token(cpus: Cpus, scheduling: Scheduling, stages: &Stages, tokens: u32) -> Result<Duration, BenchError> {
    let posts = || (0..stages.microbatches).map(|_| Post::default()).collect::<Vec<_>>();
    let (requests, replies) = (posts(), posts());
    let (clock, latency) = (Clock::system(), stages.wire / 2);
    let [start_round, rounds] = [WARM_UP, WARM_UP + tokens].map(|tokens| u64::from(stages.layers) * u64::from(tokens));
    let schedule = |stage| if sleeps(stage) { scheduling.apply() } else { Ok(()) };
    let attention = |over: &AtomicBool| {
        schedule(stages.attention)?;
        let mut start_ns = 0;
        for round in 0..rounds {
            for (request, reply) in requests.iter().zip(&replies) {
                reply.arrive(round, latency, &clock, over)?;
                compute(&clock, clock.now(), stages.attention);
                request.post(round + 1, &clock);
            }
            if round == start_round {
                start_ns = clock.now_ns();
            }
        }
        // As far into a round as the start was.
        for reply in &replies {
            reply.arrive(rounds, latency, &clock, over)?;
            compute(&clock, clock.now(), stages.attention);
        }
        Ok(Duration::from_nanos(clock.now_ns() - start_ns) / tokens)
    };
    let ffn = |over: &AtomicBool| {
        schedule(stages.ffn)?;
        for round in 1..=rounds {
            for (request, reply) in requests.iter().zip(&replies) {
                request.arrive(round, latency, &clock, over)?;
                compute(&clock, clock.now(), stages.ffn);
                reply.post(round, &clock);
            }
        }
        Ok(())
    };
    Ok(cpus.duel(attention, ffn)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_at_least_what_the_stages_allow() {
        let us = Duration::from_micros;
        let Ok(cpus) = Cpus::choose(None) else { return println!("skipped: one CPU") };
        let point = |wire| Stages { attention: us(20), ffn: us(10), wire: us(wire), microbatches: 3, layers: 5 };
        for stages in [point(0), point(400)] {
            let token = token(cpus, Scheduling::best(), &stages, 2).expect("a run");
            assert!(token >= stages.ideal().mul_f64(0.9), "{token:?} of {:?}", stages.ideal());
        }
    }
}
