//! Sleeping and being woken.

use super::Fixture;
use super::world::{A, B, World, notify, work};
use std::thread;
use std::time::{Duration, Instant};

/// What a wait is given that something should end.
const LONG: Duration = Duration::from_secs(20);
/// How soon it should then end, on a busy machine.
const SOON: Duration = Duration::from_secs(5);

/// Another thread ends a wait that has begun.
pub fn a_waker_ends_a_wait(fixture: &mut dyn Fixture) {
    let (mut world, _link) = World::connected(fixture, 1);
    let waker = world.ends[A].endpoint.waker();
    let start = Instant::now();
    let other = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        waker.wake();
    });
    world.ends[A].endpoint.wait(LONG).expect("wait");
    assert!(start.elapsed() < SOON, "woke after {:?}", start.elapsed());
    other.join().expect("the waking thread");
}

/// A wake is remembered by the next wait; also after polls.
pub fn a_wake_before_the_wait_is_not_lost(fixture: &mut dyn Fixture) {
    let (mut world, _link) = World::connected(fixture, 1);
    world.ends[A].poll();
    world.ends[A].endpoint.waker().wake();
    let start = Instant::now();
    world.ends[A].endpoint.wait(LONG).expect("wait");
    assert!(start.elapsed() < SOON, "woke after {:?}", start.elapsed());
}

/// With nothing to see, a wait ends by its time-out, whether or not the endpoint has links.
pub fn a_wait_ends_by_its_timeout(fixture: &mut dyn Fixture) {
    let mut world = World::new(fixture);
    for connected in [false, true] {
        if connected {
            world.link(1);
        }
        for timeout in [Duration::ZERO, Duration::from_millis(1), Duration::from_millis(50)] {
            let start = Instant::now();
            world.ends[A].endpoint.wait(timeout).expect("wait");
            assert!(start.elapsed() < timeout + Duration::from_secs(2), "{timeout:?} took {:?}", start.elapsed());
        }
    }
}

/// A peer's immediate, sent from another thread, ends a wait.
pub fn a_wait_ends_when_something_arrives(fixture: &mut dyn Fixture) {
    let (world, link) = World::connected(fixture, 1);
    let World { fixture, ends: [mut a, mut b] } = world;
    let start = Instant::now();
    thread::scope(|scope| {
        let other = scope.spawn(move || {
            thread::sleep(Duration::from_millis(50));
            b.endpoint.post(link.0[B], 0, &[work(notify(9))]).expect("post");
            for _ in 0..20 {
                b.poll();
                thread::sleep(Duration::from_millis(5));
            }
            b
        });
        while a.immediates(link.0[A]).is_empty() {
            assert!(start.elapsed() < SOON, "nothing within {:?}", start.elapsed());
            if !a.poll() {
                a.endpoint.wait(LONG).expect("wait");
                fixture.pass();
            }
        }
        drop(other.join().expect("the sending thread"));
    });
    assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
}
