//! Queue pairs that the connection manager connects: all of the suite, and what only it can refuse.

use super::faults::{each_end_comes_late, interface, may_change_interfaces, run};
use super::rails::two_rails;
use super::{Connect, Verbs, be_doomed};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use stepmesh_transport::testing::{self, A, B, Fixture, Link, Soak, World};
use stepmesh_transport::verbs::VerbsOptions;
use stepmesh_transport::{Disconnect, LinkSpec, Side};

const LONG: Duration = Duration::from_secs(10);

fn options() -> VerbsOptions {
    VerbsOptions { connect: Connect::ConnectionManager, ..Default::default() }
}

/// Not a test of its own.
#[test]
fn doomed_peer() {
    be_doomed(options());
}

stepmesh_transport::conformance_suite!(fixture!(options()));

#[test]
fn connects_a_peer_that_comes_late() {
    each_end_comes_late(&mut fixture!(options()));
}

#[test]
fn spreads_lanes_over_two_rails() {
    testing::counts_all_lanes_once_each(&mut two_rails!(options()));
    testing::soak(&mut two_rails!(options()), &Soak { transfers: 1000, seed: 5, ..Soak::default() });
}

fn specs() -> [LinkSpec; 2] {
    let active = testing::spec(2, Side::Active);
    [active, LinkSpec { side: Side::Passive, ..active }]
}

/// Somebody who knows where a half listens, but not the secret, is refused, and does the half no harm.
#[test]
fn refuses_a_stranger() {
    let mut fixture = fixture!(options());
    let mut world = World::new(&mut fixture);
    let specs = specs();
    let (b, of_b) = world.ends[B].endpoint.open(specs[B]).unwrap();
    // After version, kind, lanes, rails, incarnation and nonce: an IPv4 address at the end of its 16 bytes, and a port.
    let [address, port] = [&of_b[36..40], &of_b[40..42]];
    let address = address.iter().map(u8::to_string).collect::<Vec<_>>().join(".");
    let port = u16::from_le_bytes([port[0], port[1]]).to_string();
    let mut stranger = Command::new("rping")
        .args(["-c", "-C", "1", "-I", &address, "-a", &address, "-p", &port])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("rping, of Debian's rdmacm-utils");
    let start = Instant::now();
    let status = loop {
        world.pump();
        if let Some(status) = stranger.try_wait().unwrap() {
            break status;
        }
        assert!(start.elapsed() < LONG, "the stranger is neither let in nor refused");
    };
    let said = stranger.wait_with_output().unwrap();
    let said = [said.stdout, said.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert!(!status.success() && said.contains("REJECTED"), "{status}: {said}");
    assert_eq!((world.ends[B].connected(b), world.ends[B].ended(b)), (0, None));
    let (a, of_a) = world.ends[A].endpoint.open(specs[A]).unwrap();
    world.ends[A].endpoint.connect(a, &of_b, LONG).unwrap();
    world.ends[B].endpoint.connect(b, &of_a, LONG).unwrap();
    world.until("both are connected", |ends| ends[A].connected(a) == 1 && ends[B].connected(b) == 1);
    world.assert_alive(Link([a, b]));
}

/// The reason for which a half that dials `of_b` from `a` is not connected.
fn why_not_connected(world: &mut World<'_>, spec: LinkSpec, of_b: &[u8]) -> Disconnect {
    let (a, _) = world.ends[A].endpoint.open(spec).unwrap();
    let start = Instant::now();
    let timeout = Duration::from_secs(4);
    world.ends[A].endpoint.connect(a, of_b, timeout).unwrap();
    world.until("the dialling end gives up", |ends| ends[A].ended(a).is_some());
    assert!(start.elapsed() < timeout, "it knew earlier");
    world.ends[A].ended(a).unwrap().clone()
}

#[test]
fn says_that_nobody_listens() {
    let mut fixture = fixture!(options());
    let mut world = World::new(&mut fixture);
    let specs = specs();
    let (_, of_b) = world.ends[B].endpoint.open(specs[B]).unwrap();
    world.ends[B].endpoint = world.ends[B].device.endpoint().unwrap();
    let why = why_not_connected(&mut world, specs[A], &of_b);
    assert!(matches!(&why, Disconnect::NotConnected(why) if why.contains("reason 8")), "{why:?}");
}

/// The index of a GID on a device, once it has one for this IPv4 address.
fn gid_index(device: &str, address: Ipv4Addr) -> u8 {
    let [a, b, c, d] = address.octets();
    let gid = format!("0000:0000:0000:0000:0000:ffff:{a:02x}{b:02x}:{c:02x}{d:02x}");
    let start = Instant::now();
    loop {
        let of = |index: u8| std::fs::read_to_string(format!("/sys/class/infiniband/{device}/ports/1/gids/{index}"));
        if let Some(index) = (0..32).find(|&index| of(index).is_ok_and(|found| found.trim() == gid)) {
            return index;
        }
        assert!(start.elapsed() < LONG, "{device} has no GID {gid}");
    }
}

#[test]
fn says_that_an_address_leads_nowhere() {
    let mut fixture = fixture!(options());
    if !may_change_interfaces() {
        return;
    }
    let name = fixture.names[fixture.names.len() - 1].clone();
    let (interface, address) = (interface(&name), Ipv4Addr::new(10, 9, 7, 1));
    let with_prefix = format!("{address}/24");
    run("ip", &["address", "add", &with_prefix, "dev", &interface]);
    let options = VerbsOptions { gid_index: Some(gid_index(&name, address)), ..options() };
    let mut world = World::new(&mut fixture);
    let specs = specs();
    let listener = super::open(VerbsOptions { devices: vec![name], ..options }).unwrap();
    world.ends[B].endpoint = listener.endpoint().unwrap();
    let (_, of_b) = world.ends[B].endpoint.open(specs[B]).unwrap();
    run("ip", &["address", "delete", &with_prefix, "dev", &interface]);
    let why = why_not_connected(&mut world, specs[A], &of_b);
    assert!(matches!(&why, Disconnect::NotConnected(why) if why.contains(&address.to_string())), "{why:?}");
}

#[test]
fn refuses_a_peer_that_connects_by_descriptors() {
    let mut fixture = fixture!(options());
    let mut world = World::new(&mut fixture);
    let other = Verbs { next: 1, ..fixture!(VerbsOptions::default()) }.device();
    world.ends[B].endpoint = other.endpoint().unwrap();
    world.ends[B].device = other;
    let link = world.dial(specs(), LONG);
    for reason in world.both_ended(link) {
        assert!(matches!(&reason, Disconnect::Rejected(why) if why.contains("connection manager")), "{reason:?}");
    }
}
