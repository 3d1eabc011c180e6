//! Bytes get to where they are sent, and no further.

use super::Fixture;
use super::world::{A, B, World, notify, pattern, write, write_immediate};
use crate::{Access, Op, Remote, Source, Target};

/// A write changes its range of the peer's region and nothing else.
pub fn writes_bytes(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let target = world.grant(link, B, 4096, Access::PeerWrite);
    let source = world.ends[A].source(1, 1000);
    world.perform(A, link, write(&source, 100..900, &target.remote, 200));
    world.flush(A, link, 1);
    assert_eq!(target.bytes(200..1000), pattern(1, 1000)[100..900]);
    assert!(target.bytes(0..200).iter().chain(&target.bytes(1000..4096)).all(|byte| *byte == 0));
}

/// When an immediate is seen, its bytes and those of earlier writes on the lane are in memory.
pub fn delivers_bytes_before_their_immediate(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let target = world.grant(link, B, 1 << 18, Access::PeerWrite);
    let half = 1 << 17;
    for round in 0..20 {
        let source = world.ends[A].source(round, 2 * half);
        world.post(A, link, 0, write(&source, 0..half, &target.remote, 0), None);
        let last = write_immediate(&source, half..2 * half, &target.remote, half as u64, round as u32);
        world.post(A, link, 0, last, Some(round));
        world.until("the immediate arrives", |ends| {
            ends[B].immediates(link.0[B]).last().is_some_and(|last| last.1 == round as u32)
        });
        assert!(target.bytes(0..2 * half) == pattern(round, 2 * half), "round {round}");
        world.until("the work is done", |ends| ends[A].sent(link.0[A]).len() as u64 > round);
    }
}

/// A read brings the peer's bytes here, also from a region granted for reading only.
pub fn reads_bytes(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    for access in [Access::PeerRead, Access::PeerWrite] {
        let granted = world.grant(link, B, 5000, access);
        granted.region.write(0, &pattern(3, 5000)).expect("fill");
        let here = world.ends[A].device.allocate(5000, Access::Local, None).expect("allocate");
        let target = Target { region: &here, offset: 7, len: 4001 };
        world.perform(A, link, Op::Read { remote: Remote { region: &granted.remote, offset: 99 }, target });
        let mut bytes = vec![0; 5000];
        here.read(0, &mut bytes).expect("in bounds");
        assert_eq!(bytes[7..4008], pattern(3, 5000)[99..4100]);
        assert!(bytes[..7].iter().chain(&bytes[4008..]).all(|byte| *byte == 0));
    }
}

/// Nothing is a legal thing to write, with and without an immediate, with and without a place.
pub fn carries_zero_length_writes_and_immediates(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let target = world.grant(link, B, 64, Access::PeerWrite);
    let source = world.ends[A].source(1, 64);
    world.perform(A, link, write(&source, 5..5, &target.remote, 64));
    world.perform(A, link, write_immediate(&source, 64..64, &target.remote, 0, 1));
    world.perform(A, link, notify(2));
    world.until("both immediates arrive", |ends| ends[B].immediates(link.0[B]).len() == 2);
    assert_eq!(world.ends[B].immediates(link.0[B]), [(0, 1), (0, 2)]);
    assert_eq!(target.bytes(0..64), [0; 64]);
}

/// A region can be written from its first byte to its last in one piece.
pub fn writes_a_whole_region_at_once(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let len = (8 << 20) + 13;
    let target = world.grant(link, B, len, Access::PeerWrite);
    let source = world.ends[A].source(2, len);
    world.perform(A, link, write_immediate(&source, 0..len, &target.remote, 0, 1));
    world.until("the immediate arrives", |ends| !ends[B].immediates(link.0[B]).is_empty());
    assert!(target.bytes(0..len) == pattern(2, len), "the region differs from its source");
}

/// Nothing needs to be aligned.
pub fn writes_odd_sizes_at_unaligned_offsets(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let len = 70_000;
    let target = world.grant(link, B, len, Access::PeerWrite);
    let source = world.ends[A].source(4, len);
    let mut expected = vec![0; len];
    for (i, size) in [1, 2, 3, 7, 63, 64, 65, 255, 257, 4095, 4097, 65_537].into_iter().enumerate() {
        let (from, to) = (i * 5 + 1, i * 11 + 3);
        world.perform(A, link, write(&source, from..from + size, &target.remote, to as u64));
        world.flush(A, link, 1);
        expected[to..to + size].copy_from_slice(&pattern(4, len)[from..from + size]);
        assert!(target.bytes(0..len) == expected, "{size} bytes from {from} to {to}");
    }
}

/// Both ends may send at the same time.
pub fn carries_traffic_both_ways_at_once(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let targets = [B, A].map(|granter| world.grant(link, granter, 64 * 1000, Access::PeerWrite));
    let sources = [A, B].map(|end| world.ends[end].source(end as u64, 64 * 1000));
    for i in 0..64 {
        for end in [A, B] {
            let range = i * 1000..(i + 1) * 1000;
            let offset = range.start as u64;
            let op = write_immediate(&sources[end], range, &targets[end].remote, offset, i as u32);
            world.post(end, link, 0, op, None);
        }
    }
    world.until("all has arrived", |ends| (0..2).all(|end| ends[end].immediates(link.0[end]).len() == 64));
    for end in [A, B] {
        let order: Vec<_> = (0..64).map(|i| (0, i)).collect();
        assert_eq!(world.ends[1 - end].immediates(link.0[1 - end]), order);
        assert!(targets[end].bytes(0..64_000) == pattern(end as u64, 64_000));
    }
}

/// Inline bytes are copied at the post.
pub fn lets_an_inline_source_be_reused_at_once(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let len = world.ends[A].device.properties().max_inline;
    let target = world.grant(link, B, 32 * len.max(1), Access::PeerWrite);
    let mut bytes = vec![0; len];
    for i in 0..32 {
        bytes.copy_from_slice(&pattern(i, len));
        let remote = Remote { region: &target.remote, offset: i * len as u64 };
        world.post(A, link, 0, Op::Write { source: Source::Inline(&bytes), remote }, None);
        bytes.fill(0xEE);
    }
    world.flush(A, link, 1);
    for i in 0..32 {
        assert_eq!(target.bytes(i * len..(i + 1) * len), pattern(i as u64, len));
    }
}
