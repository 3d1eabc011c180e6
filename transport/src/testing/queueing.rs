//! Queues, chains, signals and lanes: what the poster may rely on.

use super::Fixture;
use super::world::{A, B, World, notify, pattern, work, write, write_immediate};
use crate::{Access, Op, PostError, Remote, Source, Target, Work};
use std::time::Duration;

/// A lane is filled until it would block, twice; all that was accepted arrives, in order, and nothing else.
pub fn loses_nothing_when_queues_are_full(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let target = world.grant(link, B, 64, Access::PeerWrite);
    let source = world.ends[A].source(1, 64);
    let most = 4 * world.ends[A].device.properties().queue_depth as u32;
    let mut accepted = 0;
    for _ in 0..2 {
        let limit = accepted + most;
        while accepted < limit {
            let op = write_immediate(&source, 0..64, &target.remote, 0, accepted);
            match world.ends[A].endpoint.post(link.0[A], 0, &[Work { op, signal: Some(u64::from(accepted)) }]) {
                Ok(()) => accepted += 1,
                Err(PostError::WouldBlock) => break,
                Err(error) => panic!("post: {error}"),
            }
        }
        world.until("what was accepted has arrived and is reported", |ends| {
            ends[B].immediates(link.0[B]).len() as u32 >= accepted && ends[A].sent(link.0[A]).len() as u32 >= accepted
        });
    }
    assert!(accepted > 1);
    let arrived: Vec<_> = (0..accepted).map(|i| (0, i)).collect();
    let reported: Vec<_> = (0..accepted).map(|i| (u64::from(i), Ok(()))).collect();
    assert_eq!(world.ends[B].immediates(link.0[B]), arrived);
    assert_eq!(world.ends[A].sent(link.0[A]), reported);
}

/// Of a chain that does not fit, or that has one bad link, nothing is posted.
pub fn posts_a_chain_whole_or_not_at_all(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let most = world.ends[A].device.properties().queue_depth as u32;
    let length = 5.min(most);
    let mut accepted = 0;
    for chain in 0..4 * most {
        let chain: Vec<_> = (0..length).map(|i| work(notify(chain * length + i))).collect();
        match world.ends[A].endpoint.post(link.0[A], 0, &chain) {
            Ok(()) => accepted += length,
            Err(PostError::WouldBlock) => break,
            Err(error) => panic!("post: {error}"),
        }
    }
    world.until("whole chains arrive", |ends| ends[B].immediates(link.0[B]).len() as u32 >= accepted);
    let source = world.ends[A].source(1, 10);
    let bad = Op::WriteImmediate { source: Source::region(&source, 0..10), remote: None, immediate: 1 };
    let refused = world.ends[A].endpoint.post(link.0[A], 0, &[work(notify(7)), work(bad), work(notify(8))]);
    assert!(matches!(refused, Err(PostError::Invalid(_))), "{refused:?}");
    world.linger(Duration::from_millis(20));
    let arrived: Vec<_> = (0..accepted).map(|i| (0, i)).collect();
    assert_eq!(world.ends[B].immediates(link.0[B]), arrived);
}

/// A lane, a local range or an inline length that cannot be is refused at the post, and harms nothing.
pub fn refuses_work_that_cannot_be(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 2);
    let target = world.grant(link, B, 1 << 20, Access::PeerWrite);
    let source = world.ends[A].source(1, 100);
    let inline = vec![0; world.ends[A].device.properties().max_inline + 1];
    let remote = Remote { region: &target.remote, offset: 0 };
    let cases = [
        (2, notify(1)),
        (0, write(&source, 50..101, &target.remote, 0)),
        (0, Op::Write { source: Source::Region(&source, usize::MAX, 2), remote }),
        (0, Op::Write { source: Source::Inline(&inline), remote }),
        (0, Op::Read { remote, target: Target { region: &source, offset: 1, len: 100 } }),
        (0, Op::Read { remote, target: Target { region: &source, offset: usize::MAX, len: 1 } }),
    ];
    for (lane, op) in cases {
        let refused = world.ends[A].endpoint.post(link.0[A], lane, &[work(op)]);
        assert!(matches!(refused, Err(PostError::Invalid(_))), "lane {lane}, {op:?}: {refused:?}");
    }
    world.assert_alive(link);
}

/// Success is told for work with a token only, in order.
pub fn reports_only_what_was_signalled(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let target = world.grant(link, B, 64, Access::PeerWrite);
    let source = world.ends[A].source(1, 64);
    for round in 0..10 {
        let write = write(&source, 0..64, &target.remote, 0);
        let chain = [work(write), work(write), Work { op: notify(round), signal: Some(u64::from(round)) }, work(write)];
        while world.ends[A].endpoint.post(link.0[A], 0, &chain) == Err(PostError::WouldBlock) {
            world.pump();
        }
    }
    world.until("the signals come", |ends| ends[A].sent(link.0[A]).len() >= 10);
    world.linger(Duration::from_millis(20));
    assert_eq!(world.ends[A].sent(link.0[A]), (0..10).map(|round| (round, Ok(()))).collect::<Vec<_>>());
}

/// Stripes a transfer over lanes again and again; each lane reports each transfer once, in its own order.
fn counts_lanes(fixture: &mut dyn Fixture, lanes: u8) {
    let (mut world, link) = World::connected(fixture, lanes);
    let stripe = 3000;
    let len = stripe * usize::from(lanes);
    let rounds = 30;
    let target = world.grant(link, B, len * rounds, Access::PeerWrite);
    let source = world.ends[A].source(1, len * rounds);
    for round in 0..rounds {
        for lane in 0..lanes {
            let start = round * len + usize::from(lane) * stripe;
            let op = write_immediate(&source, start..start + stripe, &target.remote, start as u64, round as u32);
            world.post(A, link, lane, op, None);
        }
    }
    let all = rounds * usize::from(lanes);
    world.until("all lanes have reported", |ends| ends[B].immediates(link.0[B]).len() >= all);
    world.linger(Duration::from_millis(5));
    let arrived = world.ends[B].immediates(link.0[B]);
    for lane in 0..lanes {
        let of_lane: Vec<_> = arrived.iter().filter(|seen| seen.0 == lane).map(|seen| seen.1 as usize).collect();
        assert_eq!(of_lane, (0..rounds).collect::<Vec<_>>(), "lane {lane}");
    }
    assert_eq!(arrived.len(), all);
    assert!(target.bytes(0..len * rounds) == pattern(1, len * rounds));
}

/// Two lanes.
pub fn counts_two_lanes_once_each(fixture: &mut dyn Fixture) {
    counts_lanes(fixture, 2);
}

/// As many lanes as a link may have.
pub fn counts_all_lanes_once_each(fixture: &mut dyn Fixture) {
    let lanes = fixture.device().properties().max_lanes;
    counts_lanes(fixture, lanes);
}
