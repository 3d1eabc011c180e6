//! The tcp provider: the conformance suite.

use std::sync::Arc;
use stepmesh_transport::testing::{self, DoomedPeer, Fixture};
use stepmesh_transport::{Device, DeviceOptions, Provider};

struct Tcp;

impl Fixture for Tcp {
    fn device(&mut self) -> Arc<dyn Device> {
        stepmesh_transport::open(Provider::Tcp, &DeviceOptions::default()).expect("a loopback device")
    }

    fn doomed_peer(&mut self) -> Option<Box<dyn DoomedPeer>> {
        Some(Box::new(testing::child::spawn("doomed_peer")))
    }
}

/// Not a test of its own: the process that `doomed_peer` starts and kills.
#[test]
fn doomed_peer() {
    testing::child::serve(|| Tcp.device());
}

stepmesh_transport::conformance_suite!(Tcp);
