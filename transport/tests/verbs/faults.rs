//! What only a fabric can do: a peer that dies on an idle link, a port that goes down, loss.

use super::Verbs;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_transport::testing::{self, A, B, End, Fixture, Soak, World, work, write};
use stepmesh_transport::verbs::VerbsOptions;
use stepmesh_transport::{Completion, Disconnect, LinkSpec, PostError, Side, Work};

/// The test may change network interfaces: for guests and name spaces of its own.
pub(super) fn may_change_interfaces() -> bool {
    let may = std::env::var_os("STEPMESH_BREAK_INTERFACES").is_some();
    if !may {
        println!("skipped: set STEPMESH_BREAK_INTERFACES where the network interfaces may be taken down");
    }
    may
}

pub(super) fn run(command: &str, arguments: &[&str]) {
    let status = Command::new(command).args(arguments).status().expect(command);
    assert!(status.success(), "{command} {arguments:?}: {status}");
}

/// The network interface under a Soft-RoCE device.
pub(super) fn interface(device: &str) -> String {
    std::fs::read_to_string(format!("/sys/class/infiniband/{device}/parent")).expect("a Soft-RoCE device").trim().into()
}

/// A rail of its own for the test: a third device, on an interface that nothing else uses.
pub(super) struct ThirdRail;

impl ThirdRail {
    pub(super) const DEVICE: &'static str = "rxe_third";
    pub(super) const INTERFACE: &'static str = "third0";

    pub(super) fn make() -> Self {
        run("ip", &["link", "add", Self::INTERFACE, "mtu", "4200", "type", "dummy"]);
        run("ip", &["address", "add", "10.9.3.1/24", "dev", Self::INTERFACE]);
        run("ip", &["link", "set", Self::INTERFACE, "up"]);
        run("rdma", &["link", "add", Self::DEVICE, "type", "rxe", "netdev", Self::INTERFACE]);
        Self
    }
}

impl Drop for ThirdRail {
    fn drop(&mut self) {
        run("rdma", &["link", "delete", Self::DEVICE]);
        run("ip", &["link", "delete", Self::INTERFACE]);
    }
}

#[test]
fn sees_that_the_peer_of_an_idle_link_is_killed() {
    let mut fixture = fixture!(VerbsOptions::default());
    let mut peer = fixture.doomed_peer().unwrap();
    let (mut world, survivor) = World::connected(&mut fixture, 1);
    let active = testing::spec(1, Side::Active);
    let (link, of_a) = world.ends[A].endpoint.open(active).unwrap();
    let of_peer = peer.connect(LinkSpec { side: Side::Passive, ..active }, &of_a);
    world.ends[A].endpoint.connect(link, &of_peer, Duration::from_secs(10)).unwrap();
    world.until("the doomed peer is connected", |ends| ends[A].connected(link) == 1);
    world.linger(Duration::from_secs(1));
    assert_eq!(world.ends[A].ended(link), None, "silence is no death");
    peer.kill();
    let killed = Instant::now();
    world.until("the death is seen", |ends| ends[A].ended(link).is_some());
    assert!(killed.elapsed() < Duration::from_secs(2), "seen after {:?}", killed.elapsed());
    assert!(matches!(world.ends[A].ended(link), Some(Disconnect::PeerGone(_))), "{:?}", world.ends[A].ended(link));
    world.assert_alive(survivor);
}

/// `kill -9` while both lanes are full: all that was posted is answered, in order, the link ends by `PeerGone`, and the
/// one to another peer carries bytes before that is seen and after.
#[test]
fn a_peer_killed_mid_transfer_takes_only_its_own_link_along() {
    const BYTES: usize = 16 << 10;
    let mut fixture = fixture!(VerbsOptions::default());
    let mut peer = fixture.doomed_peer().unwrap();
    let (mut world, survivor) = World::connected(&mut fixture, 1);
    let active = testing::spec(2, Side::Active);
    let (link, of_a) = world.ends[A].endpoint.open(active).unwrap();
    let of_peer = peer.connect(LinkSpec { side: Side::Passive, ..active }, &of_a);
    world.ends[A].endpoint.connect(link, &of_peer, Duration::from_secs(10)).unwrap();
    world.until("the doomed peer is connected", |ends| ends[A].connected(link) == 1);
    let target = world.ends[A].endpoint.import(link, &peer.grant(2 * BYTES), None).unwrap();
    let source = world.ends[A].source(1, BYTES);
    let mut posted: [u64; 2] = [0; 2];
    let mut stream = |end: &mut End| {
        for lane in [0, 1] {
            let op = write(&source, 0..BYTES, &target, (usize::from(lane) * BYTES) as u64);
            let token = &mut posted[usize::from(lane)];
            while end.endpoint.post(link, lane, &[Work { op, signal: Some(*token) }]).is_ok() {
                *token += 1;
            }
        }
        posted
    };
    world.until("writes stream", |ends| {
        stream(&mut ends[A]);
        ends[A].sent(link).len() > 20
    });
    let full = stream(&mut world.ends[A]);
    peer.kill();
    let killed = Instant::now();
    let unanswered = full.iter().sum::<u64>() as usize - world.ends[A].sent(link).len();
    assert!(unanswered > 100, "{unanswered} writes were under way");
    world.assert_alive(survivor);
    let mut posted = [0; 2];
    world.until("the death is seen", |ends| {
        posted = stream(&mut ends[A]);
        ends[A].ended(link).is_some()
    });
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(2), "seen after {took:?}");
    assert!(matches!(world.ends[A].ended(link), Some(Disconnect::PeerGone(_))), "{:?}", world.ends[A].ended(link));
    for of in [0, 1] {
        let answers = world.ends[A].seen.iter().filter_map(|completion| match *completion {
            Completion::Sent { link: on, lane, token, result } if on == link && lane == of => Some((token, result)),
            _ => None,
        });
        let answers: Vec<_> = answers.collect();
        assert!(answers.iter().map(|(token, _)| *token).eq(0..posted[usize::from(of)]), "lane {of}: {answers:?}");
        let arrived = answers.iter().take_while(|(_, result)| result.is_ok()).count();
        assert!(arrived < answers.len(), "lane {of} was full");
        assert!(answers[arrived..].iter().all(|(_, result)| result.is_err()), "lane {of}: {answers:?}");
    }
    world.ends[A].endpoint.close(link);
    world.assert_alive(survivor);
}

#[test]
fn connects_a_peer_that_comes_late() {
    each_end_comes_late(&mut fixture!(VerbsOptions::default()));
}

/// Each end dials long before the other; both orders connect.
pub(super) fn each_end_comes_late(fixture: &mut Verbs) {
    let mut world = World::new(fixture);
    for early in [A, B] {
        let spec = testing::spec(2, Side::Active);
        let specs = [spec, LinkSpec { side: Side::Passive, ..spec }];
        let [(a, of_a), (b, of_b)] = [A, B].map(|end| world.ends[end].endpoint.open(specs[end]).unwrap());
        let (ids, peers) = ([a, b], [of_b, of_a]);
        for end in [early, 1 - early] {
            world.ends[end].endpoint.connect(ids[end], &peers[end], Duration::from_secs(10)).unwrap();
            world.linger(Duration::from_millis(1500));
        }
        world.until("both are connected", |ends| [A, B].iter().all(|&end| ends[end].connected(ids[end]) == 1));
        world.assert_alive(testing::Link(ids));
    }
}

#[test]
fn ends_the_links_of_a_port_that_goes_down() {
    let mut fixture = fixture!(VerbsOptions::default());
    if !may_change_interfaces() {
        return;
    }
    let interface = interface(&fixture.names[0]);
    let (mut world, link) = World::connected(&mut fixture, 2);
    world.assert_alive(link);
    let start = Instant::now();
    run("ip", &["link", "set", &interface, "down"]);
    let reasons = world.both_ended(link);
    let took = start.elapsed();
    run("ip", &["link", "set", &interface, "up"]);
    assert!(reasons.iter().all(|reason| matches!(reason, Disconnect::PeerGone(_))), "{reasons:?}");
    assert!(took < Duration::from_secs(5), "seen after {took:?}");
    let refused = world.ends[A].endpoint.post(link.0[A], 0, &[work(testing::notify(1))]);
    assert_eq!(refused, Err(PostError::NotConnected(link.0[A])));
    std::thread::sleep(Duration::from_millis(500));
    let (mut anew, link) = World::connected(&mut fixture, 1);
    anew.assert_alive(link);
}

#[test]
fn loses_nothing_on_a_fabric_that_loses_packets() {
    let mut fixture = fixture!(VerbsOptions { retries: 6, ..Default::default() });
    if !may_change_interfaces() {
        return;
    }
    let interfaces: Vec<_> = fixture.names.iter().take(2).map(|name| interface(name)).collect();
    for interface in &interfaces {
        run("tc", &["qdisc", "add", "dev", interface, "root", "netem", "loss", "1%"]);
    }
    let soak = Soak { transfers: 500, seed: 3, ..Soak::default() };
    let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| testing::soak(&mut fixture, &soak)));
    for interface in &interfaces {
        run("tc", &["qdisc", "del", "dev", interface, "root"]);
    }
    passed.unwrap();
}

#[test]
fn names_what_it_cannot_open() {
    let fixture = fixture!(VerbsOptions::default());
    let options = VerbsOptions { devices: vec!["nonesuch".into()], ..Default::default() };
    let error = super::open(options).err().expect("refused").to_string();
    assert!(error.contains("nonesuch") && error.contains(&fixture.names[0]), "{error}");
    let error = super::open(VerbsOptions { timeout: 32, ..Default::default() }).err().expect("refused").to_string();
    assert!(error.contains("timeout is 32"), "{error}");
    let wrong = VerbsOptions { devices: fixture.names[..1].to_vec(), gid_index: Some(255), ..Default::default() };
    let error = super::open(wrong).err().expect("refused").to_string();
    assert!(error.contains("GID 255") && error.contains(&fixture.names[0]), "{error}");
    let wrong = VerbsOptions { devices: vec![format!("{}:200", fixture.names[0])], ..Default::default() };
    let error = super::open(wrong).err().expect("refused").to_string();
    assert!(error.contains("port 200"), "{error}");
    let _: Arc<_> = super::open(VerbsOptions::default()).unwrap();
}
