//! The shm provider keeps the promises of the conformance suite, and cleans up after itself.

use std::sync::Arc;
use stepmesh_transport::testing::{self, DoomedPeer, Fixture, Soak};
use stepmesh_transport::{Device, DeviceOptions, Provider};

struct Shm;

impl Fixture for Shm {
    fn device(&mut self) -> Arc<dyn Device> {
        stepmesh_transport::open(Provider::Shm, &DeviceOptions::default()).expect("a shm device")
    }

    fn doomed_peer(&mut self) -> Option<Box<dyn DoomedPeer>> {
        Some(Box::new(testing::child::spawn("doomed_peer")))
    }
}

/// Not a test of its own: the process that the suite starts and kills.
#[test]
fn doomed_peer() {
    testing::child::serve(|| Shm.device());
}

stepmesh_transport::conformance_suite!(Shm);

#[test]
fn a_million_random_transfers_arrive_byte_for_byte() {
    let soak = Soak { transfers: 1_000_000, largest: 1 << 20, lanes: 4, seed: 5, threads: true };
    testing::soak(&mut Shm, &soak);
}
