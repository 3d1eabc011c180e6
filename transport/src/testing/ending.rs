//! How links end, what arrives before, and that nothing arrives after.

use super::Fixture;
use super::world::{A, B, World, notify, pattern, spec, work, write, write_immediate};
use crate::{Access, Completion, Disconnect, LinkSpec, Op, PostError, Remote, Side, Target, Work, WorkError};
use std::time::Duration;

/// Of three links between the same endpoints one ends; the others carry on.
pub fn ends_one_link_and_leaves_the_others(fixture: &mut dyn Fixture) {
    let mut world = World::new(fixture);
    let links = [1, 2, 1].map(|lanes| world.link(lanes));
    for link in links {
        world.assert_alive(link);
    }
    world.ends[A].endpoint.close(links[1].0[A]);
    world.until("the peer sees the end", |ends| ends[B].ended(links[1].0[B]).is_some());
    world.ends[B].endpoint.close(links[1].0[B]);
    for link in [links[0], links[2]] {
        world.assert_alive(link);
        assert!([A, B].iter().all(|&end| world.ends[end].ended(link.0[end]).is_none()));
    }
}

/// What was reported as sent arrives, all of it, and then `Closed`, and then nothing.
pub fn closes_after_what_was_sent_has_arrived(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 2);
    let target = world.grant(link, B, 100_000, Access::PeerWrite);
    let source = world.ends[A].source(1, 100_000);
    for i in 0..100 {
        let range = i * 1000..(i + 1) * 1000;
        let offset = range.start as u64;
        let op = write_immediate(&source, range, &target.remote, offset, i as u32);
        world.post(A, link, (i % 2) as u8, op, Some(i as u64));
    }
    world.until("all is sent", |ends| ends[A].sent(link.0[A]).len() == 100);
    world.ends[A].endpoint.close(link.0[A]);
    world.until("the peer sees the end", |ends| ends[B].ended(link.0[B]).is_some());
    world.linger(Duration::from_millis(20));
    assert_eq!(world.ends[B].immediates(link.0[B]).len(), 100);
    let closed = Completion::Disconnected { link: link.0[B], reason: Disconnect::Closed };
    assert_eq!(world.ends[B].seen.last(), Some(&closed));
    assert!(target.bytes(0..100_000) == pattern(1, 100_000));
    assert_eq!(world.ends[A].ended(link.0[A]), None, "who closes is not told of it");
}

/// After `close` the link takes nothing and tells nothing.
pub fn a_closed_link_is_unknown_and_closing_again_does_nothing(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let region = world.ends[A].device.allocate(64, Access::PeerWrite, None).expect("allocate");
    let other = world.link(1);
    world.ends[A].endpoint.close(link.0[A]);
    world.ends[A].endpoint.close(link.0[A]);
    world.ends[A].endpoint.close(crate::LinkId(u32::MAX));
    assert_eq!(world.ends[A].endpoint.post(link.0[A], 0, &[work(notify(1))]), Err(PostError::NotConnected(link.0[A])));
    assert!(world.ends[A].endpoint.grant(link.0[A], &region, Access::PeerRead).is_err());
    assert!(world.ends[A].endpoint.connect(link.0[A], b"", Duration::ZERO).is_err());
    world.until("the peer sees the end", |ends| ends[B].ended(link.0[B]).is_some());
    let refused = world.ends[B].endpoint.post(link.0[B], 0, &[work(notify(1))]);
    assert_eq!(refused, Err(PostError::NotConnected(link.0[B])));
    world.ends[B].endpoint.close(link.0[B]);
    world.assert_alive(other);
}

/// Signalled work never stays unanswered: it is done or flushed before `Disconnected`.
pub fn flushes_what_was_outstanding_when_the_peer_closes(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let target = world.grant(link, B, 1 << 20, Access::PeerWrite);
    let source = world.ends[A].source(1, 1 << 20);
    let mut posted = 0;
    while posted < 64 {
        let op = write(&source, 0..1 << 20, &target.remote, 0);
        match world.ends[A].endpoint.post(link.0[A], 0, &[Work { op, signal: Some(posted) }]) {
            Ok(()) => posted += 1,
            Err(PostError::WouldBlock) => break,
            Err(error) => panic!("post: {error}"),
        }
    }
    world.ends[B].endpoint.close(link.0[B]);
    world.until("the poster sees the end", |ends| ends[A].ended(link.0[A]).is_some());
    let tokens: Vec<_> = world.ends[A].sent(link.0[A]).iter().map(|sent| sent.0).collect();
    assert_eq!(tokens, (0..posted).collect::<Vec<_>>());
    let results: Vec<_> = world.ends[A].sent(link.0[A]).iter().map(|sent| sent.1).collect();
    assert!(results.is_sorted_by_key(|result| result.is_err()), "{results:?}");
    assert!(results.iter().all(|result| matches!(result, Ok(()) | Err(WorkError::Flushed))), "{results:?}");
    assert!(matches!(world.ends[A].seen.last(), Some(Completion::Disconnected { .. })));
}

/// The poster may forget its source region as soon as the work is posted.
pub fn keeps_a_dropped_source_alive_until_it_is_sent(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let len = 1 << 20;
    let target = world.grant(link, B, 8 * len, Access::PeerWrite);
    for i in 0..8 {
        let source = world.ends[A].source(i as u64, len);
        world.post(A, link, 0, write(&source, 0..len, &target.remote, (i * len) as u64), None);
    }
    world.flush(A, link, 1);
    for i in 0..8 {
        assert!(target.bytes(i * len..(i + 1) * len) == pattern(i as u64, len), "source {i}");
    }
}

/// A granted region lives through its grant, not through its owner's handle.
pub fn keeps_a_granted_region_alive_when_its_owner_drops_it(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let remote = world.grant(link, B, 10_000, Access::PeerWrite).remote;
    let source = world.ends[A].source(1, 10_000);
    world.perform(A, link, write(&source, 0..10_000, &remote, 0));
    let back = world.ends[A].device.allocate(10_000, Access::Local, None).expect("allocate");
    let target = Target { region: &back, offset: 0, len: 10_000 };
    world.perform(A, link, Op::Read { remote: Remote { region: &remote, offset: 0 }, target });
    let mut bytes = vec![0; 10_000];
    back.read(0, &mut bytes).expect("in bounds");
    assert_eq!(bytes, pattern(1, 10_000));
}

/// The fence: the receiver gives a transfer up while its stripes are under way and links anew with a new region. No
/// byte of the old incarnation appears in it, nor, where peers do not map memory, in the old region from then on.
pub fn a_late_stripe_never_reaches_the_next_incarnation(fixture: &mut dyn Fixture) {
    let (mut world, mut link) = World::connected(fixture, 2);
    let len = 1 << 20;
    let stable = !world.ends[B].device.properties().maps_peer_memory;
    let mut target = world.grant(link, B, len, Access::PeerWrite);
    for round in 0..10 {
        let source = world.ends[A].source(round, len);
        for lane in 0..2 {
            let range = usize::from(lane) * (len / 2)..usize::from(lane + 1) * (len / 2);
            let offset = range.start as u64;
            world.post(A, link, lane, write_immediate(&source, range, &target.remote, offset, 1), None);
        }
        for _ in 0..round {
            world.pump();
        }
        world.ends[B].endpoint.close(link.0[B]);
        let given_up = target.bytes(0..len);
        let late = write(&source, 0..len, &target.remote, 0);
        // The poster does not know yet, or it does: its last stripe is accepted and lost, or refused.
        let _ = world.ends[A].endpoint.post(link.0[A], 0, &[work(late)]);
        let next = world.link(2);
        let fresh = world.grant(next, B, len, Access::PeerWrite);
        world.until("the poster sees the end", |ends| ends[A].ended(link.0[A]).is_some());
        world.linger(Duration::from_millis(5));
        assert!(fresh.bytes(0..len).iter().all(|byte| *byte == 0), "a late stripe reached the new region");
        assert!(!stable || target.bytes(0..len) == given_up, "a late stripe reached a region after the fence");
        world.ends[A].endpoint.close(link.0[A]);
        (link, target) = (next, fresh);
    }
    world.assert_alive(link);
}

/// A peer that dies without a word is noticed soon, its link alone ends, and outstanding work is answered.
pub fn sees_a_killed_peer_within_a_second(fixture: &mut dyn Fixture) {
    let Some(mut peer) = fixture.doomed_peer() else { return };
    let (mut world, survivor) = World::connected(fixture, 1);
    let active = spec(2, Side::Active);
    let (link, of_a) = world.ends[A].endpoint.open(active).expect("open");
    let of_peer = peer.connect(LinkSpec { side: Side::Passive, ..active }, &of_a);
    world.ends[A].endpoint.connect(link, &of_peer, Duration::from_secs(10)).expect("connect");
    world.until("the doomed peer is connected", |ends| {
        peer.poll();
        ends[A].connected(link) == 1
    });
    let granted = peer.grant(4096);
    let remote = world.ends[A].endpoint.import(link, &granted, None).expect("import");
    let source = world.ends[A].source(1, 4096);
    let post = |world: &mut World<'_>, token| {
        let op = write_immediate(&source, 0..4096, &remote, 0, 1);
        world.ends[A].endpoint.post(link, (token % 2) as u8, &[Work { op, signal: Some(token) }])
    };
    post(&mut world, 0).expect("post");
    world.until("the doomed peer takes a write", |ends| {
        peer.poll();
        ends[A].sent(link) == [(0, Ok(()))]
    });
    let clock = world.fixture.clock();
    peer.kill();
    let killed = clock.now();
    let posted = (1..20).take_while(|&token| post(&mut world, token).is_ok()).count();
    world.until("the death is seen", |ends| ends[A].ended(link).is_some());
    let took = clock.now() - killed;
    assert!(took < Duration::from_secs(1), "seen after {took:?}");
    let reason = world.ends[A].ended(link).expect("just seen");
    assert!(matches!(reason, Disconnect::PeerGone(_)), "{reason:?}");
    assert_eq!(world.ends[A].sent(link).len(), 1 + posted, "every signal is answered");
    world.ends[A].endpoint.close(link);
    world.assert_alive(survivor);
}
