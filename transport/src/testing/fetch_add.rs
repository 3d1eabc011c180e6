//! Fetch-add: a peer's number changes in one step, where the provider does it; else the refusal names it.

use super::Fixture;
use super::world::{A, B, World, work};
use crate::{Access, Disconnect, Op, PostError, Region, Remote, RemoteRegion, Target, WorkError};

/// A fetch-add on the number at `offset`, whose earlier value comes to the start of `here`.
fn fetch_add<'a>(region: &'a RemoteRegion, offset: u64, here: &'a Region, add: u64) -> Op<'a> {
    Op::FetchAdd { remote: Remote { region, offset }, target: Target { region: here, offset: 0, len: 8 }, add }
}

fn number(region: &Region, offset: usize) -> u64 {
    let mut bytes = [0; 8];
    region.read(offset, &mut bytes).expect("in bounds");
    u64::from_ne_bytes(bytes)
}

/// Whether the provider does it; where not, it is refused by a name, and nothing else is harmed.
fn is_done(world: &mut World<'_>, link: super::Link) -> bool {
    if world.ends[A].device.properties().fetch_add {
        return true;
    }
    let target = world.grant(link, B, 64, Access::PeerWrite);
    let here = world.ends[A].source(1, 64);
    let refused = world.ends[A].endpoint.post(link.0[A], 0, &[work(fetch_add(&target.remote, 0, &here, 1))]);
    let named = matches!(refused, Err(PostError::Unsupported { what, .. }) if what.contains("fetch-add"));
    assert!(named, "{refused:?}");
    world.assert_alive(link);
    false
}

/// The earlier value comes back, sums wrap, and the neighbours stay as they are.
pub fn adds_to_a_number_of_the_peers(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    if !is_done(&mut world, link) {
        return;
    }
    let target = world.grant(link, B, 4096, Access::PeerWrite);
    let here = world.ends[A].device.allocate(64, Access::Local, None).expect("allocate");
    let mut sum = 0_u64;
    for add in [7, 0, u64::MAX, 1 << 63, 1 << 63, 0x0123_4567_89AB_CDEF] {
        let place = Target { region: &here, offset: 24, len: 8 };
        let remote = Remote { region: &target.remote, offset: 40 };
        world.perform(A, link, Op::FetchAdd { remote, target: place, add });
        assert_eq!(number(&here, 24), sum);
        sum = sum.wrapping_add(add);
    }
    world.flush(A, link, 1);
    assert_eq!(number(&target.region, 40), sum);
    assert!(target.bytes(0..40).iter().chain(&target.bytes(48..4096)).all(|byte| *byte == 0));
}

/// Each of many fetch-adds, over several lanes and links, takes a number of its own.
pub fn adds_one_after_the_other_from_several_links(fixture: &mut dyn Fixture) {
    const EACH: usize = 40;
    let (mut world, first) = World::connected(fixture, 2);
    if !is_done(&mut world, first) {
        return;
    }
    let links = [first, world.link(2)];
    let region = world.ends[B].device.allocate(64, Access::PeerWrite, None).expect("allocate");
    let granted = links.map(|link| world.grant_region(link, B, region.clone(), Access::PeerWrite));
    let here = world.ends[A].device.allocate(8 * EACH * 4, Access::Local, None).expect("allocate");
    let mut posted = 0;
    for _ in 0..EACH {
        for (link, granted) in links.iter().zip(&granted) {
            for lane in 0..2 {
                let remote = Remote { region: &granted.remote, offset: 8 };
                let target = Target { region: &here, offset: 8 * posted, len: 8 };
                world.post(A, *link, lane, Op::FetchAdd { remote, target, add: 1 }, Some(posted as u64));
                posted += 1;
            }
        }
    }
    world.until("all are done", |ends| links.iter().map(|link| ends[A].sent(link.0[A]).len()).sum::<usize>() == posted);
    let mut taken: Vec<_> = (0..posted).map(|index| number(&here, 8 * index)).collect();
    taken.sort_unstable();
    assert_eq!(taken, (0..posted as u64).collect::<Vec<_>>());
    assert_eq!(number(&region, 8), posted as u64);
}

/// A place that is not a multiple of eight, a target of another size or outside its region: refused at the post.
pub fn refuses_a_fetch_add_that_cannot_be(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    if !is_done(&mut world, link) {
        return;
    }
    let granted = world.grant(link, B, 64, Access::PeerWrite);
    let here = world.ends[A].source(1, 64);
    let cases = [(1, 0, 8), (4, 0, 8), (0, 0, 4), (0, 0, 16), (0, 0, 0), (0, 57, 8), (0, usize::MAX, 8)];
    for (remote, offset, len) in cases {
        let remote = Remote { region: &granted.remote, offset: remote };
        let op = Op::FetchAdd { remote, target: Target { region: &here, offset, len }, add: 1 };
        let refused = world.ends[A].endpoint.post(link.0[A], 0, &[work(op)]);
        assert!(matches!(refused, Err(PostError::Invalid(_))), "{op:?}: {refused:?}");
    }
    world.assert_alive(link);
}

/// A number behind the region, and one that is granted for reading only: the peer's side refuses, and nothing changes.
pub fn refuses_a_fetch_add_that_was_not_granted(fixture: &mut dyn Fixture) {
    let mut world = World::new(fixture);
    let survivor = world.link(1);
    if !is_done(&mut world, survivor) {
        return;
    }
    for (access, offset) in [(Access::PeerWrite, 64), (Access::PeerWrite, u64::MAX - 7), (Access::PeerRead, 0)] {
        let link = world.link(1);
        let granted = world.grant(link, B, 64, access);
        let claimed = RemoteRegion { access: Access::PeerWrite, len: u64::MAX, ..granted.remote.clone() };
        let here = world.ends[A].device.allocate(64, Access::Local, None).expect("allocate");
        world.post(A, link, 0, fetch_add(&claimed, offset, &here, 5), Some(9));
        for reason in world.both_ended(link) {
            assert!(matches!(reason, Disconnect::AccessRefused(_)), "{reason:?}");
        }
        assert_eq!(world.ends[A].sent(link.0[A]), [(9, Err(WorkError::RemoteAccess))]);
        assert_eq!((number(&here, 0), granted.bytes(0..64)), (0, vec![0; 64]));
        world.assert_alive(survivor);
    }
}
