//! The verbs provider: the conformance suite between the first two RDMA devices of this machine (the same one twice if
//! there is one only). Where there is none the tests pass with a line that says so, unless `STEPMESH_REQUIRE_RDMA` is set.

#![allow(clippy::unwrap_used)]

/// A fixture, or the end of the test that asks for it where there is no device.
macro_rules! fixture {
    ($options:expr) => {
        match Verbs::with($options) {
            Some(fixture) => fixture,
            None => return,
        }
    };
}

#[path = "verbs/connection_manager.rs"]
mod connection_manager;
#[path = "verbs/faults.rs"]
mod faults;
#[path = "verbs/memory.rs"]
mod memory;
#[path = "verbs/packets.rs"]
mod packets;
#[path = "verbs/rails.rs"]
mod rails;

use std::sync::Arc;
use std::time::Duration;
use stepmesh_transport::testing::{self, DoomedPeer, Fixture, Soak};
use stepmesh_transport::verbs::{self, Connect, VerbsOptions};
use stepmesh_transport::{Device, DeviceOptions, Provider, TransportError};

/// The devices, in turn.
struct Verbs {
    names: Vec<String>,
    /// The first device of the next member, and how far its follower's is from it.
    next: usize,
    step: usize,
    /// How many each member takes as its rails.
    rails: usize,
    options: VerbsOptions,
}

impl Verbs {
    fn with(options: VerbsOptions) -> Option<Self> {
        match verbs::device_names() {
            Ok(names) => Some(Self { names, next: 0, step: 1, rails: 1, options }),
            Err(why) => {
                assert!(std::env::var_os("STEPMESH_REQUIRE_RDMA").is_none(), "{why}");
                println!("skipped: {why}");
                None
            }
        }
    }

    fn open(&self, names: &[String]) -> Arc<dyn Device> {
        open(VerbsOptions { devices: names.to_vec(), ..self.options.clone() }).expect("an RDMA device")
    }
}

fn open(verbs: VerbsOptions) -> Result<Arc<dyn Device>, TransportError> {
    stepmesh_transport::open(Provider::Verbs, &DeviceOptions { verbs, ..DeviceOptions::default() })
}

impl Fixture for Verbs {
    fn device(&mut self) -> Arc<dyn Device> {
        let mut names = self.names.clone();
        names.rotate_left(self.next % self.names.len());
        self.next += self.step;
        self.open(&names[..self.rails])
    }

    /// Two pollers that never rest starve Soft-RoCE's workers.
    fn pass(&mut self) {
        std::thread::sleep(Duration::from_micros(200));
    }

    fn doomed_peer(&mut self) -> Option<Box<dyn DoomedPeer>> {
        Some(Box::new(testing::child::spawn(match self.options.connect {
            Connect::Descriptors => "doomed_peer",
            Connect::ConnectionManager => "connection_manager::doomed_peer",
        })))
    }
}

/// The life of the process that the suite starts and kills.
fn be_doomed(options: VerbsOptions) {
    if let Some(fixture) = Verbs::with(options) {
        testing::child::serve(|| fixture.open(&fixture.names[fixture.names.len() - 1..]));
    }
}

/// Not a test of its own.
#[test]
fn doomed_peer() {
    be_doomed(VerbsOptions::default());
}

stepmesh_transport::conformance_suite!(fixture!(VerbsOptions::default()));

#[test]
fn ten_thousand_random_transfers_arrive_byte_for_byte() {
    let soak = Soak { transfers: 10_000, largest: 64 << 10, lanes: 4, seed: 5, threads: true };
    testing::soak(&mut fixture!(VerbsOptions::default()), &soak);
}

/// A device that takes no inline bytes sends them all the same, from a ring.
#[test]
fn stages_inline_bytes_that_the_device_does_not_take() {
    let mut fixture = fixture!(VerbsOptions { inline_bytes: 0, ..Default::default() });
    testing::lets_an_inline_source_be_reused_at_once(&mut fixture);
    testing::soak(&mut fixture, &Soak { transfers: 1000, seed: 2, ..Soak::default() });
}
