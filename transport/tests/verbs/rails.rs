//! Members with several rails. The first rail of one is joined with the second of the other, and the other way round.

use super::Verbs;
use super::faults::{ThirdRail, may_change_interfaces, run};
use std::time::{Duration, Instant};
use stepmesh_transport::testing::{self, A, B, Fixture, World, notify, work};
use stepmesh_transport::verbs::VerbsOptions;
use stepmesh_transport::{Access, Disconnect, PostError};

/// A fixture of members with two rails, or the end of the test that asks for it where there are no two devices.
macro_rules! two_rails {
    () => {
        two_rails!(VerbsOptions::default())
    };
    ($options:expr) => {{
        let fixture = fixture!($options);
        if fixture.names.len() < 2 {
            assert!(std::env::var_os("STEPMESH_REQUIRE_RDMA").is_none(), "one RDMA device only");
            return println!("skipped: one RDMA device only");
        }
        Verbs { rails: 2, ..fixture }
    }};
}
pub(super) use two_rails;

/// The behaviours of the suite in which links have several lanes, or whose links have to be told apart.
macro_rules! on_two_rails {
    ($($behaviour:ident)*) => {
        $(
            #[test]
            fn $behaviour() {
                testing::$behaviour(&mut two_rails!());
            }
        )*
    };
}

on_two_rails! {
    connects_both_ways_and_each_end_sees_it_once
    delivers_bytes_before_their_immediate
    counts_two_lanes_once_each
    counts_all_lanes_once_each
    refuses_a_wrong_key
    refuses_an_offset_beyond_the_region
    refuses_a_write_to_a_read_only_grant
    refuses_the_key_of_another_link
    nothing_reaches_memory_after_the_end
    ends_one_link_and_leaves_the_others
    closes_after_what_was_sent_has_arrived
    a_late_stripe_never_reaches_the_next_incarnation
    sees_a_killed_peer_within_a_second
    a_wait_ends_when_something_arrives
    survives_a_random_soak
}

#[test]
fn says_how_many_rails_it_has() {
    let mut fixture = two_rails!();
    assert_eq!(fixture.device().properties().rails, 2);
    fixture.rails = 1;
    assert_eq!(fixture.device().properties().rails, 1);
}

/// Both ends have what they need of both rails: reads and writes, from regions of every access, on every lane.
#[test]
fn uses_any_region_on_any_lane() {
    let mut fixture = two_rails!();
    let (mut world, link) = World::connected(&mut fixture, 4);
    for access in [Access::Local, Access::PeerRead, Access::PeerWrite] {
        let target = world.grant(link, B, 4096, Access::PeerWrite);
        let source = world.ends[A].device.allocate(4096, access, None).unwrap();
        source.write(0, &testing::pattern(7, 4096)).unwrap();
        for lane in 0..4 {
            let range = usize::from(lane) * 1024..usize::from(lane + 1) * 1024;
            let offset = range.start as u64;
            let op = testing::write_immediate(&source, range, &target.remote, offset, 1);
            world.post(A, link, lane, op, None);
        }
        world.flush(A, link, 4);
        assert_eq!(target.bytes(0..4096), testing::pattern(7, 4096), "{access:?}");
    }
}

/// Members need not have equally many rails.
#[test]
fn connects_members_with_different_numbers_of_rails() {
    for first in [1, 2] {
        let mut fixture = two_rails!();
        fixture.rails = first;
        let mut world = World::new(&mut fixture);
        let fewer_or_more = Verbs { rails: 3 - first, next: 1, ..two_rails!() }.device();
        world.ends[B].endpoint = fewer_or_more.endpoint().unwrap();
        world.ends[B].device = fewer_or_more;
        let link = world.link(4);
        world.assert_alive(link);
        let target = world.grant(link, B, 4000, Access::PeerWrite);
        let source = world.ends[A].source(1, 4000);
        for lane in 0..4 {
            let start = usize::from(lane) * 1000;
            let write = testing::write(&source, start..start + 1000, &target.remote, start as u64);
            world.post(A, link, lane, write, None);
        }
        world.flush(A, link, 4);
        assert_eq!(target.bytes(0..4000), testing::pattern(1, 4000));
    }
}

#[test]
fn refuses_rails_that_cannot_be() {
    let fixture = fixture!(VerbsOptions::default());
    let open = |devices: Vec<String>| super::open(VerbsOptions { devices, ..Default::default() });
    let name = &fixture.names[0];
    let why = open(vec![name.clone(), format!("{name}:1")]).err().expect("refused").to_string();
    assert!(why.contains("twice") && why.contains(name), "{why}");
    let why = open(vec![format!("{name}:9")]).err().expect("refused").to_string();
    assert!(why.contains("port"), "{why}");
    let why = open(vec![name.clone(); 9]).err().expect("refused").to_string();
    assert!(why.contains("9 rails"), "{why}");
}

#[test]
fn a_port_that_goes_down_ends_the_links_that_have_lanes_on_it_and_no_other() {
    let fixture = two_rails!();
    if !may_change_interfaces() {
        return;
    }
    let third = ThirdRail::make();
    // The third rail leads to itself only, so each member has the same rails in the same order.
    let names = vec![fixture.names[0].clone(), ThirdRail::DEVICE.into()];
    let mut fixture = Verbs { names, step: 0, ..fixture };
    {
        let mut world = World::new(&mut fixture);
        let [one, two, four] = [1, 2, 4].map(|lanes| world.link(lanes));
        world.flush(A, two, 2);
        let start = Instant::now();
        run("ip", &["link", "set", ThirdRail::INTERFACE, "down"]);
        for link in [two, four] {
            let reasons = world.both_ended(link);
            assert!(reasons.iter().all(|reason| matches!(reason, Disconnect::PeerGone(_))), "{reasons:?}");
            let refused = world.ends[A].endpoint.post(link.0[A], 0, &[work(notify(1))]);
            assert_eq!(refused, Err(PostError::NotConnected(link.0[A])));
        }
        let took = start.elapsed();
        assert!(took < Duration::from_secs(5), "seen after {took:?}");
        world.linger(Duration::from_millis(500));
        assert!([A, B].iter().all(|&end| world.ends[end].ended(one.0[end]).is_none()));
        world.assert_alive(one);
        run("ip", &["link", "set", ThirdRail::INTERFACE, "up"]);
        std::thread::sleep(Duration::from_millis(500));
        let anew = world.link(2);
        world.flush(A, anew, 2);
        world.assert_alive(one);
    }
    drop(third);
}
