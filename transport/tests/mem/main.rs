//! The in-memory provider passes the conformance suite, with and without mapped peer memory.
#![allow(clippy::unwrap_used)]

mod faults;

use std::sync::Arc;
use std::time::Duration;
use stepmesh_transport::mem::{Fabric, FabricOptions};
use stepmesh_transport::testing::{self, DoomedPeer, Fixture};
use stepmesh_transport::{Access, Clock, Completion, Descriptor, Device, Endpoint, LinkId, LinkSpec, Side};

struct Simulated {
    fabric: Fabric,
    devices: usize,
}

impl Simulated {
    fn new(options: FabricOptions) -> Self {
        Self { fabric: Fabric::new(options), devices: 0 }
    }
}

fn simulated(maps_peer_memory: bool) -> Simulated {
    Simulated::new(FabricOptions {
        seed: 7,
        lane_skew: Duration::ZERO..Duration::from_micros(20),
        bandwidth: Some(10_000_000_000),
        queue_depth: 32,
        maps_peer_memory,
        ..FabricOptions::default()
    })
}

impl Fixture for Simulated {
    fn device(&mut self) -> Arc<dyn Device> {
        self.devices += 1;
        self.fabric.device(format!("device-{}", self.devices))
    }

    fn pass(&mut self) {
        if !self.fabric.advance_to_next() {
            self.fabric.advance(Duration::from_millis(1));
        }
    }

    fn clock(&self) -> Clock {
        self.fabric.clock()
    }

    fn doomed_peer(&mut self) -> Option<Box<dyn DoomedPeer>> {
        let device = self.fabric.device("doomed");
        let endpoint = device.endpoint().unwrap();
        Some(Box::new(Doomed { fabric: self.fabric.clone(), device, endpoint, link: None, seen: Vec::new() }))
    }
}

struct Doomed {
    fabric: Fabric,
    device: Arc<dyn Device>,
    endpoint: Box<dyn Endpoint>,
    link: Option<LinkId>,
    seen: Vec<Completion>,
}

impl DoomedPeer for Doomed {
    fn connect(&mut self, spec: LinkSpec, peer: &[u8]) -> Descriptor {
        let (link, descriptor) = self.endpoint.open(spec).unwrap();
        self.endpoint.connect(link, peer, Duration::from_secs(1)).unwrap();
        self.link = Some(link);
        descriptor
    }

    fn grant(&mut self, len: usize) -> Descriptor {
        let link = self.link.unwrap();
        while !self.seen.contains(&Completion::Connected { link }) {
            assert!(self.fabric.advance_to_next());
            self.poll();
        }
        let region = self.device.allocate(len, Access::PeerWrite, None).unwrap();
        self.endpoint.grant(link, &region, Access::PeerWrite).unwrap()
    }

    fn poll(&mut self) {
        self.endpoint.poll(&mut self.seen).unwrap();
    }

    fn kill(&mut self) {
        self.fabric.kill("doomed");
    }
}

/// The process that `a_child_answers_until_it_is_killed` starts; alone it does nothing.
#[test]
fn child() {
    testing::child::serve(|| Fabric::default().device("child"));
}

#[test]
fn a_child_answers_until_it_is_killed() {
    let fabric = Fabric::default();
    let mut endpoint = fabric.device("parent").endpoint().unwrap();
    let (_, ours) = endpoint.open(testing::spec(1, Side::Active)).unwrap();
    let mut child = testing::child::spawn("child");
    let theirs = child.connect(testing::spec(1, Side::Passive), &ours);
    assert_eq!(theirs.len(), ours.len());
    child.kill();
}

mod copying {
    stepmesh_transport::conformance_suite!(super::simulated(false));
}

mod mapping {
    stepmesh_transport::conformance_suite!(super::simulated(true));
}
