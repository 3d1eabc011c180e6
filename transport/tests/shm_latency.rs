//! Round trips of 8 bytes over shm, next to the floor that the machine sets: a bare cache line that two cores bounce.
//!
//! `cargo test --release -p stepmesh-transport --test shm_latency -- --ignored --nocapture`

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use stepmesh_transport::testing::{A, B, End, Fixture, Granted, Link, World, write_immediate};
use stepmesh_transport::{Access, Completion, Device, DeviceOptions, Provider, Region, Work};

const ROUNDS: usize = 200_000;

struct Shm;

impl Fixture for Shm {
    fn device(&mut self) -> std::sync::Arc<dyn Device> {
        stepmesh_transport::open(Provider::Shm, &DeviceOptions::default()).expect("a shm device")
    }
}

fn pin(core: usize) {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    rustix::thread::sched_setaffinity(None, &cores).expect("pinning");
}

/// The median and the 99th percentile of `rounds` calls, after a warm-up.
fn measure(rounds: usize, mut round: impl FnMut()) -> (Duration, Duration) {
    (0..rounds / 10).for_each(|_| round());
    let mut times: Vec<Duration> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            round();
            start.elapsed()
        })
        .collect();
    times.sort();
    (times[rounds / 2], times[rounds * 99 / 100])
}

fn cache_line() -> (Duration, Duration) {
    #[repr(align(128))]
    struct Line(AtomicU64);
    let lines = [Line(AtomicU64::new(0)), Line(AtomicU64::new(0))];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(1);
            for turn in 1.. {
                let asked = loop {
                    match lines[0].0.load(Ordering::Acquire) {
                        asked if asked >= turn => break asked,
                        _ => std::hint::spin_loop(),
                    }
                };
                lines[1].0.store(asked, Ordering::Release);
                if asked == u64::MAX {
                    return;
                }
            }
        });
        pin(0);
        let mut turn = 0;
        let times = measure(ROUNDS, || {
            turn += 1;
            lines[0].0.store(turn, Ordering::Release);
            while lines[1].0.load(Ordering::Acquire) != turn {
                std::hint::spin_loop();
            }
        });
        lines[0].0.store(u64::MAX, Ordering::Release);
        times
    })
}

/// One end of the game: a source, a target, and whether it sleeps between the strokes.
struct Player {
    end: End,
    link: stepmesh_transport::LinkId,
    target: Granted,
    source: Region,
    sleeps: bool,
    seen: Vec<Completion>,
}

impl Player {
    fn strike(&mut self, immediate: u32) {
        let op = write_immediate(&self.source, 0..8, &self.target.remote, 0, immediate);
        self.end.endpoint.post(self.link, 0, &[Work { op, signal: None }]).expect("post");
    }

    fn receive(&mut self) -> u32 {
        loop {
            self.seen.clear();
            if self.end.endpoint.poll(&mut self.seen).expect("poll") > 0 {
                match self.seen[0] {
                    Completion::Immediate { immediate, .. } => return immediate,
                    ref other => panic!("{other:?}"),
                }
            }
            match self.sleeps {
                true => self.end.endpoint.wait(Duration::from_secs(1)).expect("wait"),
                false => std::hint::spin_loop(),
            }
        }
    }
}

fn shm(sleeps: bool, rounds: usize) -> (Duration, Duration) {
    let mut fixture = Shm;
    let (mut world, link) = World::connected(&mut fixture, 1);
    let targets = [B, A].map(|granter| world.grant(link, granter, 4096, Access::PeerWrite));
    let Link(ids) = link;
    let World { ends, .. } = world;
    let mut players = ends.into_iter().zip(ids).zip(targets).map(|((end, link), target)| {
        let source = end.source(1, 4096);
        Player { end, link, target, source, sleeps, seen: Vec::with_capacity(256) }
    });
    let (mut a, mut b) = (players.next().expect("A"), players.next().expect("B"));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            pin(1);
            loop {
                let immediate = b.receive();
                b.strike(immediate);
                if immediate == u32::MAX {
                    return b;
                }
            }
        });
        pin(0);
        let times = measure(rounds, || {
            a.strike(1);
            a.receive();
        });
        a.strike(u32::MAX);
        times
    })
}

#[test]
#[ignore = "a measurement: two idle cores, a release build"]
fn round_trips() {
    for (what, (median, tail)) in [
        ("a bare cache line", cache_line()),
        ("shm, 8 bytes, spinning", shm(false, ROUNDS)),
        ("shm, 8 bytes, sleeping", shm(true, ROUNDS / 20)),
    ] {
        println!("{what:24} p50 {:6} ns   p99 {:7} ns", median.as_nanos(), tail.as_nanos());
    }
}
