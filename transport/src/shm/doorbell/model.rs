//! The doorbell in loom, whose time stands still: a wake-up that gets lost is a deadlock, and fails the model.

use super::{Futex, Woken, Words};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use loom::sync::Arc;
use std::time::Duration;

/// An endpoint that sleeps, and as many rings as there are peers: one word each, that is stored as an entry is.
struct Endpoint {
    knocks: Futex,
    sleeping: AtomicU32,
    woken: Woken,
    rings: [AtomicU64; 2],
}

impl Endpoint {
    fn new() -> Arc<Self> {
        let rings = std::array::from_fn(|_| AtomicU64::new(0));
        Arc::new(Self { knocks: Futex::new(), sleeping: AtomicU32::new(0), woken: Woken::new(), rings })
    }

    fn words(&self) -> Words<'_> {
        Words { knocks: &self.knocks, sleeping: &self.sleeping }
    }

    fn has(&self, ring: usize) -> bool {
        self.rings[ring].load(Ordering::Acquire) != 0
    }

    /// As a peer does.
    fn send(&self, ring: usize) {
        self.rings[ring].store(1, Ordering::Release);
        self.words().ring();
    }
}

fn sleeps(endpoint: &Endpoint, ready: impl Fn() -> bool) {
    while !ready() && !endpoint.words().sleep(Duration::MAX, &ready) {}
}

/// With preemptions bounded: three threads and all else would be hours.
fn bounded(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn an_endpoint_that_goes_to_sleep_misses_no_immediate() {
    loom::model(|| {
        let endpoint = Endpoint::new();
        let peer = endpoint.clone();
        let sending = loom::thread::spawn(move || peer.send(0));
        sleeps(&endpoint, || endpoint.has(0));
        sending.join().unwrap();
    });
}

#[test]
fn an_endpoint_that_goes_to_sleep_misses_no_waker() {
    loom::model(|| {
        let endpoint = Endpoint::new();
        let waker = endpoint.clone();
        let waking = loom::thread::spawn(move || waker.woken.wake(waker.words()));
        sleeps(&endpoint, || endpoint.woken.take());
        waking.join().unwrap();
        assert!(!endpoint.woken.take());
    });
}

#[test]
fn an_endpoint_that_goes_to_sleep_again_misses_neither_of_two_peers() {
    bounded(3, || {
        let endpoint = Endpoint::new();
        let sending = [0, 1].map(|ring| {
            let peer = endpoint.clone();
            loom::thread::spawn(move || peer.send(ring))
        });
        sleeps(&endpoint, || endpoint.has(0));
        sleeps(&endpoint, || endpoint.has(1));
        sending.into_iter().for_each(|peer| peer.join().unwrap());
    });
}
