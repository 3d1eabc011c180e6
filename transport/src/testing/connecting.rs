//! How links come to be, and who is kept out.

use super::Fixture;
use super::world::{A, B, World, notify, spec, work};
use crate::{Disconnect, LinkId, LinkSecret, LinkSpec, PostError, Side, TransportError};
use std::time::Duration;

/// Long enough to connect on one host, short enough to wait for.
const SHORT: Duration = Duration::from_millis(500);

/// `Connected` comes once to each end, also when the dialled end connects first.
pub fn connects_both_ways_and_each_end_sees_it_once(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    world.linger(Duration::from_millis(20));
    for end in [A, B] {
        assert_eq!(world.ends[end].seen.len(), 1, "{:?}", world.ends[end].seen);
        assert_eq!(world.ends[end].connected(link.0[end]), 1);
    }
}

/// Dials with specs that differ, and expects that neither end connects.
fn is_kept_out(fixture: &mut dyn Fixture, differ: impl FnOnce(&mut LinkSpec)) {
    let mut world = World::new(fixture);
    let passive = spec(1, Side::Passive);
    let mut active = LinkSpec { side: Side::Active, ..passive };
    differ(&mut active);
    let link = world.dial([active, passive], SHORT);
    for reason in world.both_ended(link) {
        assert!(matches!(reason, Disconnect::Rejected(_) | Disconnect::NotConnected(_)), "{reason:?}");
    }
    for end in [A, B] {
        assert_eq!(world.ends[end].connected(link.0[end]), 0);
    }
}

/// An end that does not know the secret is not let in.
pub fn refuses_a_wrong_secret(fixture: &mut dyn Fixture) {
    is_kept_out(fixture, |spec| spec.secret = LinkSecret([7; 16]));
}

/// An end of another incarnation is not let in.
pub fn refuses_a_wrong_incarnation(fixture: &mut dyn Fixture) {
    is_kept_out(fixture, |spec| spec.incarnation += 1_000_000);
}

/// The descriptor of a link that was closed connects nobody, and harms no later link.
pub fn refuses_the_descriptor_of_a_dead_incarnation(fixture: &mut dyn Fixture) {
    let (mut world, alive) = World::connected(fixture, 1);
    let active = spec(1, Side::Active);
    let (dead, of_dead) = world.ends[B].endpoint.open(LinkSpec { side: Side::Passive, ..active }).expect("open");
    world.ends[B].endpoint.close(dead);
    let (late, _) = world.ends[A].endpoint.open(active).expect("open");
    if world.ends[A].endpoint.connect(late, &of_dead, SHORT).is_ok() {
        world.until("the late end gives up", |ends| ends[A].ended(late).is_some());
        let reason = world.ends[A].ended(late).expect("just seen");
        assert!(matches!(reason, Disconnect::Rejected(_) | Disconnect::NotConnected(_)), "{reason:?}");
    }
    assert_eq!(world.ends[A].connected(late), 0);
    world.assert_alive(alive);
}

/// A link whose other end never connects ends as `NotConnected`, not before its time-out nor long after.
pub fn gives_up_connecting_to_nobody_in_time(fixture: &mut dyn Fixture) {
    let mut world = World::new(fixture);
    let active = spec(1, Side::Active);
    let (nobody, of_nobody) = world.ends[B].endpoint.open(LinkSpec { side: Side::Passive, ..active }).expect("open");
    let (link, _) = world.ends[A].endpoint.open(active).expect("open");
    let clock = world.fixture.clock();
    let start = clock.now();
    world.ends[A].endpoint.connect(link, &of_nobody, Duration::from_millis(200)).expect("connect");
    world.until("the dialling end gives up", |ends| ends[A].ended(link).is_some());
    let (reason, took) = (world.ends[A].ended(link).expect("just seen"), clock.now() - start);
    assert!(matches!(reason, Disconnect::NotConnected(_)), "{reason:?}");
    assert!(took >= Duration::from_millis(190) && took < Duration::from_secs(2), "gave up after {took:?}");
    assert_eq!(world.ends[B].connected(nobody), 0);
}

/// Bytes that are no descriptor are refused by name, and nothing is changed.
pub fn refuses_garbage_descriptors(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let (opened, good) = world.ends[A].endpoint.open(spec(1, Side::Active)).expect("open");
    let garbage: [&[u8]; 4] = [&[], b"x", &good[..good.len() - 1], &[0xA5; 200]];
    for bytes in garbage {
        let refused = world.ends[A].endpoint.connect(opened, bytes, SHORT);
        assert!(matches!(refused, Err(TransportError::Descriptor { .. })), "{bytes:?}: {refused:?}");
        let refused = world.ends[A].endpoint.import(link.0[A], bytes, None);
        assert!(matches!(refused, Err(TransportError::Descriptor { .. })), "{bytes:?}: {refused:?}");
    }
    world.assert_alive(link);
}

/// No lanes, or more lanes than there can be, are refused.
pub fn refuses_link_specs_that_cannot_be(fixture: &mut dyn Fixture) {
    let mut world = World::new(fixture);
    let max = world.ends[A].device.properties().max_lanes;
    for lanes in [0, max + 1] {
        assert!(world.ends[A].endpoint.open(spec(lanes, Side::Active)).is_err(), "{lanes} lanes");
    }
}

/// An unknown link, and one that is only opened, take no work.
pub fn posts_nothing_to_a_link_that_is_not_connected(fixture: &mut dyn Fixture) {
    let mut world = World::new(fixture);
    let (opened, _) = world.ends[A].endpoint.open(spec(1, Side::Active)).expect("open");
    for link in [opened, LinkId(u32::MAX)] {
        let refused = world.ends[A].endpoint.post(link, 0, &[work(notify(1))]);
        assert_eq!(refused, Err(PostError::NotConnected(link)));
    }
}
