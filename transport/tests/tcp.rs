//! The tcp provider: the conformance suite, what only sockets can do wrong, and peers that do not keep to the protocol.

#![allow(clippy::unwrap_used)]

#[path = "tcp/attacks.rs"]
mod attacks;
#[path = "tcp/raw.rs"]
mod raw;
#[path = "tcp/sockets.rs"]
mod sockets;

use std::sync::Arc;
use stepmesh_transport::testing::{self, DoomedPeer, Fixture, Soak};
use stepmesh_transport::{Device, DeviceOptions, Provider};

/// Devices on loopback.
#[derive(Default)]
struct Tcp {
    options: DeviceOptions,
}

impl Fixture for Tcp {
    fn device(&mut self) -> Arc<dyn Device> {
        stepmesh_transport::open(Provider::Tcp, &self.options).expect("a loopback device")
    }

    fn doomed_peer(&mut self) -> Option<Box<dyn DoomedPeer>> {
        Some(Box::new(testing::child::spawn("doomed_peer")))
    }
}

/// Not a test of its own: the process that the suite starts and kills.
#[test]
fn doomed_peer() {
    testing::child::serve(|| Tcp::default().device());
}

stepmesh_transport::conformance_suite!(Tcp::default());

#[test]
fn a_million_random_transfers_arrive_byte_for_byte() {
    let soak = Soak { transfers: 1_000_000, largest: 1 << 20, lanes: 4, seed: 5, threads: true };
    testing::soak(&mut Tcp::default(), &soak);
}
