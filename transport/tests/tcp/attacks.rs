//! Peers that do not keep to the protocol: nothing of theirs reaches memory, and nobody else is disturbed.

use super::Tcp;
use super::raw::{self, Frame, Raw};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::net::TcpListener;
use std::time::Duration;
use stepmesh_transport::testing::{A, B, World, spec};
use stepmesh_transport::{Access, DeviceOptions, Disconnect, LinkId, LinkSpec, Region, Side};

/// Bytes of the region that a raw peer may write.
const LEN: usize = 1 << 20;

fn passive() -> LinkSpec {
    spec(1, Side::Passive)
}

/// Where the endpoint of end B listens.
fn door(world: &mut World<'_>) -> std::net::SocketAddr {
    let (link, descriptor) = world.ends[B].endpoint.open(passive()).unwrap();
    world.ends[B].endpoint.close(link);
    raw::address(&descriptor)
}

#[test]
fn garbage_on_the_port_is_hung_up_on_and_disturbs_nobody() {
    let mut tcp = Tcp::default();
    let (mut world, link) = World::connected(&mut tcp, 2);
    let door = door(&mut world);
    for garbage in [&b"GET / HTTP/1.1\r\nHost: ffn\r\nAccept: everything under the sun\r\n\r\n"[..], &[0xFF; 100_000]] {
        let mut raw = Raw::dial(door);
        raw.send(garbage);
        assert_eq!(raw.receive(&mut world, 1), b"");
    }
    world.assert_alive(link);
}

#[test]
fn a_silent_connection_is_dropped_in_time() {
    let mut tcp = Tcp { options: DeviceOptions { hello_timeout: Duration::from_millis(100), ..Default::default() } };
    let (mut world, link) = World::connected(&mut tcp, 1);
    let mut raw = Raw::dial(door(&mut world));
    raw.send(&raw::message(raw::HELLO, raw::VERSION, 0, 1, [0; 32])[..20]);
    assert_eq!(raw.receive(&mut world, 1), b"");
    world.assert_alive(link);
}

#[test]
fn a_crowd_of_silent_connections_keeps_no_peer_out() {
    let mut tcp = Tcp::default();
    let mut world = World::new(&mut tcp);
    let door = door(&mut world);
    let crowd: Vec<_> = (0..300)
        .map(|_| {
            world.pump();
            Raw::dial(door)
        })
        .collect();
    let link = world.link(8);
    world.assert_alive(link);
    drop(crowd);
}

#[test]
fn a_dialler_of_another_version_is_told_the_version() {
    let mut tcp = Tcp::default();
    let (mut world, link) = World::connected(&mut tcp, 1);
    let mut raw = Raw::dial(door(&mut world));
    raw.send(&raw::message(raw::HELLO, 9, 0, 1, [0; 32]));
    let reply = raw.receive(&mut world, 57);
    assert_eq!((reply.len(), reply[10], reply[13], reply[8]), (56, raw::REJECT, 1, raw::VERSION as u8));
    world.assert_alive(link);
}

#[test]
fn a_listener_of_another_version_is_named() {
    let mut tcp = Tcp::default();
    let mut world = World::new(&mut tcp);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let active = spec(1, Side::Active);
    let (link, _) = world.ends[A].endpoint.open(active).unwrap();
    let peer = raw::descriptor(active.incarnation, listener.local_addr().unwrap());
    world.ends[A].endpoint.connect(link, &peer, Duration::from_secs(10)).unwrap();
    let mut raw = Raw(listener.accept().unwrap().0);
    raw.0.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    assert_eq!(raw.receive(&mut world, 56)[10], raw::HELLO);
    raw.send(&raw::message(raw::REJECT, 9, 1, 0, [0; 32]));
    world.until("the end gives up", |ends| ends[A].ended(link).is_some());
    let reason = world.ends[A].ended(link).unwrap();
    assert!(matches!(reason, Disconnect::Rejected(why) if why.contains("version 9")), "{reason:?}");
}

#[test]
fn a_wrong_proof_is_rejected_and_the_link_stays_open_to_its_peer() {
    let mut tcp = Tcp::default();
    let mut world = World::new(&mut tcp);
    let passive = passive();
    let (b, of_b) = world.ends[B].endpoint.open(passive).unwrap();
    let reply = Raw::dial(raw::address(&of_b)).greet(&mut world, passive, &[0; 16]);
    assert_eq!((reply[10], reply[13]), (raw::REJECT, 4));
    let stranger = LinkSpec { incarnation: 1 << 30, ..passive };
    let reply = Raw::dial(raw::address(&of_b)).greet(&mut world, stranger, &passive.secret.0);
    assert_eq!((reply[10], reply[13]), (raw::REJECT, 2));
    let (a, of_a) = world.ends[A].endpoint.open(LinkSpec { side: Side::Active, ..passive }).unwrap();
    world.ends[A].endpoint.connect(a, &of_b, Duration::from_secs(10)).unwrap();
    world.ends[B].endpoint.connect(b, &of_a, Duration::from_secs(10)).unwrap();
    world.until("the true peer connects", |ends| ends[A].connected(a) == 1 && ends[B].connected(b) == 1);
}

/// A raw peer with the secret, a region that it may write, and an honest link beside it.
struct Stage<'f> {
    world: World<'f>,
    bystander: stepmesh_transport::testing::Link,
    raw: Raw,
    link: LinkId,
    region: Region,
    /// A write of 64 bytes that would be taken.
    good: Frame,
}

impl<'f> Stage<'f> {
    fn new(tcp: &'f mut Tcp) -> Self {
        let (mut world, bystander) = World::connected(tcp, 1);
        let passive = passive();
        let (raw, link) = Raw::connected(&mut world, passive);
        let region = world.ends[B].device.allocate(LEN, Access::PeerWrite, None).unwrap();
        let granted = world.ends[B].endpoint.grant(link, &region, Access::PeerWrite).unwrap();
        let (incarnation, key) = (passive.incarnation, raw::key(&granted));
        let good = Frame { opcode: raw::WRITE, incarnation, key, len: 64, ..Default::default() };
        Self { world, bystander, raw, link, region, good }
    }

    fn reason(&mut self) -> Disconnect {
        let link = self.link;
        self.world.until("the link ends", |ends| ends[B].ended(link).is_some());
        self.world.assert_alive(self.bystander);
        self.world.ends[B].ended(link).unwrap().clone()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        self.region.read(0, &mut bytes).unwrap();
        bytes
    }

    /// The frame is refused by a frame that says so, and no byte moved.
    fn expect_refusal(mut self, frame: Frame) {
        let sequence = frame.sequence;
        self.raw.send(&frame.bytes());
        self.raw.send(&[0xAB; 10_000]);
        let reason = self.reason();
        assert!(matches!(reason, Disconnect::AccessRefused(_)), "{reason:?}");
        let reply = self.raw.receive(&mut self.world, 56);
        assert_eq!((reply[2], &reply[40..48]), (raw::REFUSED, &sequence.to_le_bytes()[..]));
        assert!(self.bytes() == [0; LEN]);
    }
}

#[test]
fn a_raw_peer_that_keeps_to_the_protocol_is_taken_seriously() {
    let mut tcp = Tcp::default();
    let mut stage = Stage::new(&mut tcp);
    let frame = Frame { opcode: raw::WRITE_IMMEDIATE, offset: 100, ..stage.good };
    stage.raw.send(&[frame.bytes(), vec![0xAB; 64]].concat());
    let link = stage.link;
    stage.world.until("the immediate arrives", |ends| ends[B].immediates(link) == [(0, 0)]);
    assert_eq!(stage.bytes()[99..165], [&[0][..], &[0xAB; 64], &[0]].concat());
}

#[test]
fn a_frame_that_is_larger_than_its_region_is_refused() {
    for len in [LEN as u64 + 1, 1 << 40, u64::MAX] {
        let mut tcp = Tcp::default();
        let stage = Stage::new(&mut tcp);
        let frame = Frame { len, ..stage.good };
        stage.expect_refusal(frame);
    }
}

#[test]
fn a_frame_of_a_dead_incarnation_is_refused() {
    let mut tcp = Tcp::default();
    let stage = Stage::new(&mut tcp);
    let frame = Frame { incarnation: stage.good.incarnation - 1, ..stage.good };
    stage.expect_refusal(frame);
}

#[test]
fn a_truncated_frame_ends_its_link_only() {
    let mut tcp = Tcp::default();
    let mut stage = Stage::new(&mut tcp);
    let mut bytes = stage.good.bytes();
    bytes.extend([0xAB; 63]);
    stage.raw.send(&bytes);
    stage.raw.0.shutdown(std::net::Shutdown::Both).unwrap();
    let reason = stage.reason();
    assert!(matches!(&reason, Disconnect::PeerGone(why) if why.contains("middle of a frame")), "{reason:?}");
}

#[test]
fn wherever_a_frame_is_cut_its_link_ends_in_the_middle_of_a_frame() {
    for cut in [1, 2, 40, 55, 56, 57, 100] {
        let mut tcp = Tcp::default();
        let mut stage = Stage::new(&mut tcp);
        let frame = Frame { opcode: raw::WRITE_IMMEDIATE, ..stage.good };
        let bytes = [frame.bytes(), vec![0xAB; 64]].concat();
        stage.raw.send(&bytes[..cut]);
        stage.raw.0.shutdown(std::net::Shutdown::Write).unwrap();
        let reason = stage.reason();
        assert!(matches!(&reason, Disconnect::PeerGone(why) if why.contains("middle of a frame")), "{cut}: {reason:?}");
        let link = stage.link;
        assert_eq!(stage.world.ends[B].immediates(link), [], "{cut}");
    }
}

#[test]
fn a_peer_that_falls_silent_in_the_middle_of_a_frame_holds_up_nobody_else() {
    let mut tcp = Tcp::default();
    let mut stage = Stage::new(&mut tcp);
    let frame = Frame { opcode: raw::WRITE_IMMEDIATE, ..stage.good };
    let bytes = [frame.bytes(), vec![0xAB; 64]].concat();
    let link = stage.link;
    let mut sent = 0;
    for cut in [20, 56, 90] {
        stage.raw.send(&bytes[sent..cut]);
        sent = cut;
        for _ in 0..50 {
            stage.world.assert_alive(stage.bystander);
        }
        assert_eq!((stage.world.ends[B].immediates(link), stage.world.ends[B].ended(link)), (vec![], None));
    }
    stage.raw.send(&bytes[sent..]);
    stage.world.until("the rest makes it whole", |ends| ends[B].immediates(link) == [(0, 0)]);
}

#[test]
fn a_listener_that_says_nothing_is_given_up_in_time() {
    let mut tcp = Tcp::default();
    let (mut world, bystander) = World::connected(&mut tcp, 1);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let active = spec(1, Side::Active);
    let (link, _) = world.ends[A].endpoint.open(active).unwrap();
    let peer = raw::descriptor(active.incarnation, listener.local_addr().unwrap());
    world.ends[A].endpoint.connect(link, &peer, Duration::from_millis(100)).unwrap();
    let _accepted = listener.accept().unwrap();
    world.until("the end gives up", |ends| ends[A].ended(link).is_some());
    assert!(matches!(world.ends[A].ended(link), Some(Disconnect::NotConnected(_))));
    world.assert_alive(bystander);
}

#[test]
fn what_is_no_frame_breaks_the_protocol() {
    type Spoil = fn(&mut Vec<u8>);
    let spoils: [Spoil; 5] = [
        |bytes| bytes[0] ^= 1, // no magic
        |bytes| bytes[2] = 99, // no opcode
        |bytes| bytes[36] = 2, // no flag
        |bytes| bytes[40] = 5, // not the next work
        |bytes| bytes[48] = 1, // acknowledges what was never sent
    ];
    for spoil in spoils {
        let mut tcp = Tcp::default();
        let mut stage = Stage::new(&mut tcp);
        let mut bytes = stage.good.bytes();
        spoil(&mut bytes);
        bytes.extend([0xAB; 64]);
        stage.raw.send(&bytes);
        let reason = stage.reason();
        assert!(matches!(reason, Disconnect::Protocol(_)), "{reason:?}");
        assert!(stage.bytes() == [0; LEN]);
    }
}

#[test]
fn an_answer_to_no_read_and_too_many_reads_break_the_protocol() {
    for (opcode, count) in [(4, 1), (raw::READ_REQUEST, 300)] {
        let mut tcp = Tcp::default();
        let mut stage = Stage::new(&mut tcp);
        let frames = (0..count).flat_map(|sequence| Frame { opcode, sequence, len: LEN as u64, ..stage.good }.bytes());
        let frames: Vec<u8> = frames.collect();
        stage.raw.send(&frames);
        let reason = stage.reason();
        assert!(matches!(reason, Disconnect::Protocol(_)), "{reason:?}");
    }
}

/// Half of the frames are nearly right, so that the bytes get past the first check.
#[test]
fn no_bytes_of_a_peer_panic_or_reach_what_was_not_granted() {
    let mut tcp = Tcp::default();
    let (mut world, bystander) = World::connected(&mut tcp, 1);
    let guarded = world.ends[B].device.allocate(4096, Access::PeerWrite, None).unwrap();
    let bytes = prop::collection::vec(any::<u8>(), 0..300);
    let cases = (bytes, any::<bool>(), 0u8..9, 0u64..5000, 0u64..5000);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) };
    let world = std::cell::RefCell::new(&mut world);
    let run = TestRunner::new(config).run(&cases, |(bytes, honest, opcode, offset, len)| {
        let world = &mut **world.borrow_mut();
        let passive = passive();
        let (mut raw, link) = Raw::connected(world, passive);
        let granted = world.ends[B].endpoint.grant(link, &guarded, Access::PeerRead).unwrap();
        if honest {
            let (incarnation, key) = (passive.incarnation, raw::key(&granted));
            raw.send(&Frame { opcode, incarnation, key, offset, len, sequence: 0 }.bytes());
        }
        raw.send(&bytes);
        drop(raw);
        world.until("the link ends", |ends| ends[B].ended(link).is_some());
        world.ends[B].endpoint.close(link);
        let mut out = vec![0; 4096];
        guarded.read(0, &mut out).unwrap();
        prop_assert!(out == [0; 4096]);
        Ok(())
    });
    run.unwrap();
    world.into_inner().assert_alive(bystander);
}
