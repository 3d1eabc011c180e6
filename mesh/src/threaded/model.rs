//! In loom: how the member passes between the application's thread and the progress thread, in every interleaving.

use super::baton::Baton;
use loom::sync::{Arc, Condvar, Mutex};
use std::convert::Infallible;

/// What a thread sleeps on: a wake-up before the sleep is not forgotten. No time passes in a model, so that one that
/// does not come is a deadlock.
#[derive(Default)]
struct Event {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    fn wake(&self) {
        *self.set.lock().unwrap() = true;
        self.changed.notify_one();
    }

    fn sleep(&self) {
        let mut set = self.set.lock().unwrap();
        while !*set {
            set = self.changed.wait(set).unwrap();
        }
        *set = false;
    }
}

struct Shared {
    baton: Baton<u32>,
    /// What the progress thread sleeps on with the value, and without it.
    endpoint: Event,
    parked: Event,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self { baton: Baton::new(0), endpoint: Event::default(), parked: Event::default() })
    }

    /// On the application's thread: one call.
    fn call(&self) {
        let mut value = self.baton.take(|| self.endpoint.wake(), loom::thread::yield_now).unwrap();
        *value += 1;
        drop(value);
        self.baton.left(|| self.parked.wake());
    }

    /// On the progress thread: sleeps with the value if it can have it, until it is wanted.
    fn turn(&self) {
        match self.baton.try_take().unwrap() {
            Some(mut value) => {
                let sleep = |_: &mut u32| -> Result<(), Infallible> {
                    self.endpoint.sleep();
                    Ok(())
                };
                let Ok(()) = self.baton.sleep_with(&mut *value, sleep);
            }
            None => self.baton.await_departure(|| self.parked.sleep()),
        }
    }
}

/// Without a wake-up that comes by chance: one that is missed is a deadlock.
#[test]
fn a_call_gets_the_value_from_a_thread_that_goes_to_sleep_with_it() {
    loom::model(|| {
        let shared = Shared::new();
        let progress = shared.clone();
        let thread = loom::thread::spawn(move || progress.turn());
        shared.call();
        shared.baton.stop(|| shared.endpoint.wake(), || shared.parked.wake());
        thread.join().unwrap();
        assert_eq!(*shared.baton.try_take().unwrap().unwrap(), 1);
    });
}

#[test]
fn a_thread_that_waits_for_the_application_to_leave_sees_it_leave() {
    loom::model(|| {
        let shared = Shared::new();
        let progress = shared.clone();
        let thread = loom::thread::spawn(move || progress.baton.await_departure(|| progress.parked.sleep()));
        shared.call();
        thread.join().unwrap();
    });
}

#[test]
fn a_thread_is_stopped_whatever_it_waits_for() {
    loom::model(|| {
        let shared = Shared::new();
        let progress = shared.clone();
        let thread = loom::thread::spawn(move || {
            while !progress.baton.is_stopped() {
                progress.turn();
                loom::thread::yield_now();
            }
        });
        shared.baton.stop(|| shared.endpoint.wake(), || shared.parked.wake());
        thread.join().unwrap();
    });
}

#[test]
fn a_call_is_seen_by_a_thread_that_looks_for_it() {
    loom::model(|| {
        let shared = Shared::new();
        let caller = shared.clone();
        let thread = loom::thread::spawn(move || caller.call());
        let mut seen = 0;
        let early = shared.baton.is_visited(&mut seen);
        thread.join().unwrap();
        assert!(early || shared.baton.is_visited(&mut seen));
        assert!(!shared.baton.is_visited(&mut seen), "once");
    });
}
