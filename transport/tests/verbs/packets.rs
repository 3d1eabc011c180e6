//! What the options do to the packets, as the interface under a Soft-RoCE device sees them.

use super::Verbs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use stepmesh_transport::testing::{B, World, write};
use stepmesh_transport::verbs::VerbsOptions;
use stepmesh_transport::{Access, testing::A};

/// Little enough for the packets to fit the buffer of the socket that looks at them.
const LEN: usize = 16 << 10;
/// The UDP port of RoCE v2.
const ROCE: u16 = 4791;

/// A RoCE packet of one IP packet.
#[derive(Clone, Copy, Debug)]
struct Packet {
    traffic_class: u8,
    /// Bytes after the UDP header.
    len: usize,
}

/// All IPv4 packets that leave an interface.
struct Capture(OwnedFd);

impl Capture {
    /// None where the process may not look.
    fn of(interface: &str) -> Option<Self> {
        let index: i32 =
            std::fs::read_to_string(format!("/sys/class/net/{interface}/ifindex")).ok()?.trim().parse().ok()?;
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: makes a socket, or fails.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, protocol.into()) };
        if raw < 0 {
            return None;
        }
        // SAFETY: the socket was just made, and is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: all zeros is an address of this kind.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        (address.sll_family, address.sll_protocol, address.sll_ifindex) = (libc::AF_PACKET as u16, protocol, index);
        let len = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the address is of the length that is told.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
        (bound == 0).then_some(Self(socket))
    }

    /// The RoCE packets so far.
    fn packets(&self) -> Vec<Packet> {
        let mut packets = Vec::new();
        let mut bytes = [0_u8; 128];
        loop {
            // SAFETY: `bytes` has room for as much as is asked for; the true length is told.
            let len =
                unsafe { libc::recv(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_TRUNC) };
            let Ok(len) = usize::try_from(len) else { return packets };
            let header = usize::from(bytes[0] & 15) * 4;
            let port = u16::from_be_bytes([bytes[header + 2], bytes[header + 3]]);
            if len >= header + 8 && bytes[0] >> 4 == 4 && bytes[9] == 17 && port == ROCE {
                packets.push(Packet { traffic_class: bytes[1], len: len - header - 8 });
            }
        }
    }
}

/// What a write of `LEN` bytes from the first device to the second sends; none where that cannot be seen.
fn packets(fixture: &mut Verbs) -> Option<Vec<Packet>> {
    let parent = |name: &str| std::fs::read_to_string(format!("/sys/class/infiniband/{name}/parent"));
    let Some(capture) = parent(&fixture.names[0]).ok().and_then(|interface| Capture::of(interface.trim())) else {
        println!("skipped: no interface of a Soft-RoCE device to look at");
        return None;
    };
    let (mut world, link) = World::connected(fixture, 1);
    let target = world.grant(link, B, LEN, Access::PeerWrite);
    let source = world.ends[A].source(1, LEN);
    capture.packets();
    world.perform(A, link, write(&source, 0..LEN, &target.remote, 0));
    Some(capture.packets())
}

#[test]
fn packets_are_no_larger_than_the_path_mtu() {
    for (mtu, wanted) in [(256, Some(256)), (1024, Some(1024)), (4096, None)] {
        let mut fixture = fixture!(VerbsOptions { path_mtu_bytes: wanted, ..Default::default() });
        let Some(packets) = packets(&mut fixture) else { return };
        let largest = packets.iter().map(|packet| packet.len).max().expect("packets");
        // The transport's headers and checksum come on top.
        assert!((mtu..mtu + 64).contains(&largest), "{largest} bytes for a path MTU of {mtu}");
        assert!(packets.iter().filter(|packet| packet.len >= mtu).count() >= LEN / mtu);
    }
}

#[test]
fn packets_carry_the_traffic_class() {
    for class in [0, 0x68] {
        let mut fixture = fixture!(VerbsOptions { traffic_class: class, ..Default::default() });
        let Some(packets) = packets(&mut fixture) else { return };
        // The two lower bits are the network's, to tell of congestion.
        let marked = packets.iter().filter(|packet| packet.traffic_class & 0xFC == class).count();
        assert!(marked >= LEN / 4096 && marked == packets.len(), "{marked} of {packets:?}");
    }
}
