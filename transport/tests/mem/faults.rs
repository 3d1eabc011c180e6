//! What the simulated network can do to its users, and that it does it the same way every time.

use super::Simulated;
use proptest::prelude::*;
use std::time::Duration;
use stepmesh_transport::mem::{Fabric, FabricOptions, Fault, FaultPlan};
use stepmesh_transport::testing::{A, B, End, Link, World, notify, pattern, spec, work, write, write_immediate};
use stepmesh_transport::{Access, Completion, Disconnect, LinkSpec, PostError, Side, Work, WorkError};

const MILLISECOND: Duration = Duration::from_millis(1);

/// The names that the fixture gives to the ends' devices.
const NAMES: [&str; 2] = ["device-1", "device-2"];

fn stage(options: FabricOptions) -> (Simulated, Fabric) {
    let stage = Simulated::new(options);
    let fabric = stage.fabric.clone();
    (stage, fabric)
}

/// Posts immediates round robin over four lanes and logs what comes at B, with its time.
fn schedule(seed: u64) -> Vec<(u64, Completion)> {
    let (mut stage, fabric) = stage(FabricOptions { seed, ..FabricOptions::default() });
    let (mut world, link) = World::connected(&mut stage, 4);
    fabric.set_faults(FaultPlan { late: 0.1, lateness: MILLISECOND..MILLISECOND * 9, ..FaultPlan::default() });
    let mut log = Vec::new();
    for i in 0..200 {
        world.post(A, link, (i % 4) as u8, notify(i), None);
    }
    while fabric.advance_to_next() {
        world.ends[A].poll();
        world.ends[B].poll();
        log.extend(world.ends[B].seen.drain(..).map(|seen| (fabric.clock().now_ns(), seen)));
    }
    log
}

#[test]
fn the_same_seed_gives_the_same_schedule() {
    assert_eq!(schedule(1), schedule(1));
    assert_ne!(schedule(1), schedule(2));
}

#[test]
fn lanes_overtake_each_other_and_keep_their_own_order() {
    let arrived: Vec<_> = schedule(3)
        .into_iter()
        .filter_map(|(_, seen)| match seen {
            Completion::Immediate { lane, immediate, .. } => Some((lane, immediate)),
            _ => None,
        })
        .collect();
    assert!(!arrived.is_sorted_by_key(|seen| seen.1));
    for lane in 0..4 {
        assert!(arrived.iter().filter(|seen| seen.0 == lane).is_sorted_by_key(|seen| seen.1));
    }
}

#[test]
fn a_source_reused_too_early_is_seen_as_corruption() {
    let (mut stage, _) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 1);
    let target = world.grant(link, B, 100, Access::PeerWrite);
    let source = world.ends[A].source(1, 100);
    world.post(A, link, 0, write_immediate(&source, 0..100, &target.remote, 0, 1), Some(1));
    source.write(0, &pattern(2, 100)).unwrap();
    world.flush(A, link, 1);
    assert_eq!(target.bytes(0..100), pattern(2, 100));
}

#[test]
fn all_lanes_of_a_device_share_its_bandwidth() {
    let (mut stage, fabric) = stage(FabricOptions { bandwidth: Some(1_000_000_000), ..FabricOptions::default() });
    let (mut world, link) = World::connected(&mut stage, 2);
    let target = world.grant(link, B, 10_000_000, Access::PeerWrite);
    let source = world.ends[A].source(1, 10_000_000);
    let start = fabric.clock().now();
    for lane in 0..2 {
        let from = usize::from(lane) * 5_000_000;
        world.post(A, link, lane, write(&source, from..from + 5_000_000, &target.remote, from as u64), None);
    }
    world.flush(A, link, 2);
    let took = fabric.clock().now() - start;
    assert!(took >= 10 * MILLISECOND && took < 11 * MILLISECOND, "{took:?}");
}

#[test]
fn a_held_lane_arrives_late_and_in_order() {
    let (mut stage, fabric) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 2);
    world.post(A, link, 1, notify(10), None);
    fabric.hold_lane(NAMES[A], NAMES[B], 1, 10 * MILLISECOND);
    for (lane, immediate) in [(1, 11), (0, 1), (1, 12)] {
        world.post(A, link, lane, notify(immediate), None);
    }
    fabric.advance(9 * MILLISECOND);
    world.ends[B].poll();
    assert_eq!(world.ends[B].immediates(link.0[B]), [(0, 1)]);
    fabric.advance(2 * MILLISECOND);
    world.ends[B].poll();
    assert_eq!(world.ends[B].immediates(link.0[B])[1..], [(1, 10), (1, 11), (1, 12)]);
}

#[test]
fn a_stripe_held_until_after_the_fence_lands_nowhere() {
    let (mut stage, fabric) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 2);
    let target = world.grant(link, B, 200, Access::PeerWrite);
    let source = world.ends[A].source(1, 200);
    fabric.hold_lane(NAMES[A], NAMES[B], 1, 10 * MILLISECOND);
    world.post(A, link, 0, write_immediate(&source, 0..100, &target.remote, 0, 1), None);
    world.post(A, link, 1, write_immediate(&source, 100..200, &target.remote, 100, 1), None);
    world.until("the first stripe arrives", |ends| ends[B].immediates(link.0[B]).len() == 1);
    world.ends[B].endpoint.close(link.0[B]);
    let next = world.link(2);
    let fresh = world.grant(next, B, 200, Access::PeerWrite);
    fabric.advance(20 * MILLISECOND);
    world.linger(MILLISECOND);
    assert_eq!(fresh.bytes(0..200), [0; 200]);
    assert_eq!(target.bytes(0..100), pattern(1, 200)[..100]);
    assert_eq!(target.bytes(100..200), [0; 100]);
    world.assert_alive(next);
}

fn assert_both_lose_their_peer(world: &mut World<'_>, link: Link) {
    for reason in world.both_ended(link) {
        assert!(matches!(reason, Disconnect::PeerGone(_)), "{reason:?}");
    }
}

#[test]
fn a_lost_lane_ends_its_link_at_both_ends() {
    let (mut stage, fabric) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 2);
    fabric.set_faults(FaultPlan { lost: 1.0, ..FaultPlan::default() });
    world.post(A, link, 1, notify(1), Some(7));
    assert_both_lose_their_peer(&mut world, link);
    assert_eq!(world.ends[A].sent(link.0[A]), [(7, Err(WorkError::Flushed))]);
    assert!(world.ends[B].immediates(link.0[B]).is_empty());
}

#[test]
fn a_broken_link_ends_and_a_new_one_can_be_made() {
    let (mut stage, fabric) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 1);
    world.post(A, link, 0, notify(1), None);
    fabric.break_links(NAMES[B], NAMES[A]);
    assert_both_lose_their_peer(&mut world, link);
    assert!(world.ends[B].immediates(link.0[B]).is_empty());
    let next = world.link(1);
    world.assert_alive(next);
}

#[test]
fn a_short_partition_delays_and_a_long_one_ends_links() {
    let (mut stage, fabric) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 1);
    fabric.partition(NAMES[A], NAMES[B], 500 * MILLISECOND);
    world.post(A, link, 0, notify(1), None);
    fabric.advance(499 * MILLISECOND);
    world.ends[B].poll();
    assert!(world.ends[B].immediates(link.0[B]).is_empty());
    fabric.advance(2 * MILLISECOND);
    world.ends[B].poll();
    assert_eq!(world.ends[B].immediates(link.0[B]), [(0, 1)]);
    world.assert_alive(link);
    fabric.partition(NAMES[A], NAMES[B], 1500 * MILLISECOND);
    assert_both_lose_their_peer(&mut world, link);
}

#[test]
fn what_a_partition_held_up_is_lost_when_the_link_has_ended() {
    let (mut stage, fabric) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 1);
    let target = world.grant(link, B, 100, Access::PeerWrite);
    let source = world.ends[A].source(1, 100);
    fabric.partition(NAMES[A], NAMES[B], 1500 * MILLISECOND);
    world.post(A, link, 0, write_immediate(&source, 0..100, &target.remote, 0, 1), None);
    fabric.advance(2000 * MILLISECOND);
    assert_both_lose_their_peer(&mut world, link);
    assert_eq!(target.bytes(0..100), [0; 100]);
    assert!(world.ends[B].immediates(link.0[B]).is_empty());
}

#[test]
fn a_close_arrives_after_what_was_under_way() {
    let (mut stage, fabric) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 2);
    fabric.hold_lane(NAMES[A], NAMES[B], 1, 10 * MILLISECOND);
    for lane in [1, 0] {
        world.post(A, link, lane, notify(1), None);
    }
    world.ends[A].endpoint.close(link.0[A]);
    world.until("the peer sees the end", |ends| ends[B].ended(link.0[B]).is_some());
    assert_eq!(world.ends[B].immediates(link.0[B]), [(0, 1), (1, 1)]);
    assert_eq!(world.ends[B].ended(link.0[B]), Some(&Disconnect::Closed));
}

#[test]
fn a_killed_device_does_nothing_until_it_is_restarted() {
    let (mut stage, fabric) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 1);
    fabric.kill(NAMES[B]);
    assert_eq!(world.ends[B].endpoint.post(link.0[B], 0, &[]), Err(PostError::NotConnected(link.0[B])));
    world.until("the death is seen", |ends| ends[A].ended(link.0[A]).is_some());
    let device = fabric.device(NAMES[B]);
    let endpoint = device.endpoint().unwrap();
    world.ends[B] = End { device, endpoint, seen: Vec::new() };
    let next = world.link(1);
    world.assert_alive(next);
}

#[test]
fn a_script_happens_at_its_times() {
    let (mut stage, fabric) = stage(FabricOptions::default());
    let (mut world, link) = World::connected(&mut stage, 1);
    let start = fabric.clock().now();
    let kill = Fault::Kill { device: NAMES[B].into() };
    fabric.set_faults(FaultPlan { script: vec![(30 * MILLISECOND, kill)], ..FaultPlan::default() });
    world.until("the death is seen", |ends| ends[A].ended(link.0[A]).is_some());
    let took = fabric.clock().now() - start;
    assert!(took >= 31 * MILLISECOND && took < 81 * MILLISECOND, "{took:?}");
}

#[test]
fn a_half_that_dialled_and_closed_connects_nobody() {
    let (mut stage, _) = stage(FabricOptions::default());
    let mut world = World::new(&mut stage);
    let active = spec(1, Side::Active);
    let (a, of_a) = world.ends[A].endpoint.open(active).unwrap();
    let (b, of_b) = world.ends[B].endpoint.open(LinkSpec { side: Side::Passive, ..active }).unwrap();
    world.ends[B].endpoint.connect(b, &of_a, 100 * MILLISECOND).unwrap();
    world.linger(MILLISECOND);
    world.ends[B].endpoint.close(b);
    world.ends[A].endpoint.connect(a, &of_b, 100 * MILLISECOND).unwrap();
    world.until("the other half gives up", |ends| ends[A].ended(a).is_some());
    assert!(matches!(world.ends[A].ended(a), Some(Disconnect::Rejected(_))), "{:?}", world.ends[A].seen);
    assert_eq!(world.ends[A].connected(a), 0);
}

prop_compose! {
    fn any_plan()(
        late in 0.0..0.2,
        lost in prop_oneof![Just(0.0), 0.0..0.02],
        at in 0u32..20,
        fault in prop_oneof![
            Just(None),
            Just(Some(Fault::Kill { device: NAMES[B].into() })),
            Just(Some(Fault::BreakLinks { a: NAMES[A].into(), b: NAMES[B].into() })),
            (0u8..3, 1u32..50).prop_map(|(lane, time)| Some(Fault::HoldLane {
                from: NAMES[A].into(), to: NAMES[B].into(), lane, time: time * MILLISECOND,
            })),
            (1u32..3000).prop_map(|time| Some(Fault::Partition {
                a: NAMES[A].into(), b: NAMES[B].into(), time: time * MILLISECOND,
            })),
        ],
    ) -> FaultPlan {
        let script = fault.into_iter().map(|fault| (at * MILLISECOND / 10, fault)).collect();
        FaultPlan { late, lateness: MILLISECOND..MILLISECOND * 30, lost, script }
    }
}

proptest! {
    /// Whatever happens, each signal is answered once, success is a prefix of each lane, and so is what arrives.
    #[test]
    fn every_signal_is_answered_under_any_plan(plan in any_plan(), seed in any::<u64>()) {
        let (mut stage, fabric) = stage(FabricOptions { seed, ..FabricOptions::default() });
        let (mut world, link) = World::connected(&mut stage, 3);
        fabric.set_faults(plan);
        let mut posted = Vec::new();
        for i in 0..300u32 {
            let lane = (i % 3) as u8;
            let chain = [Work { op: notify(i), signal: Some(u64::from(i)) }, work(notify(u32::MAX))];
            match world.ends[A].endpoint.post(link.0[A], lane, &chain) {
                Ok(()) => posted.push(u64::from(i)),
                Err(PostError::WouldBlock) => {}
                Err(_) => break,
            }
            world.pump();
        }
        while fabric.advance_to_next() {
            world.pump();
        }
        world.linger(MILLISECOND);
        let mut tokens: Vec<_> =
            world.ends[A].sent(link.0[A]).iter().map(|sent| sent.0).filter(|token| *token != u64::MAX).collect();
        tokens.sort_unstable();
        prop_assert_eq!(&tokens, &posted);
        for lane in 0..3u8 {
            let of_lane = |token: &&u64| (**token % 3) as u8 == lane;
            let order: Vec<_> = posted.iter().filter(of_lane).map(|token| *token as u32).collect();
            let arrived: Vec<_> = world.ends[B].immediates(link.0[B]).iter()
                .filter(|seen| seen.0 == lane && seen.1 != u32::MAX).map(|seen| seen.1).collect();
            prop_assert_eq!(&order[..arrived.len()], &arrived[..]);
            let results: Vec<_> =
                world.ends[A].sent(link.0[A]).iter().filter(|sent| of_lane(&&sent.0)).map(|sent| sent.1.is_err()).collect();
            prop_assert!(results.is_sorted());
        }
    }
}
