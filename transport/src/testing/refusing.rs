//! What a peer was not granted it does not get: no byte moves, and the link that asked ends, alone.

use super::Fixture;
use super::world::{A, B, Granted, World, pattern, write};
use crate::{Access, Disconnect, Op, Remote, RemoteRegion, Target, WorkError};
use std::time::Duration;

const LEN: usize = 4096;

/// A write of 64 bytes, tampered with, is refused: the poster learns it, both ends see the link end, the region and
/// another link are untouched.
fn refuses(fixture: &mut dyn Fixture, granted: Access, tamper: impl FnOnce(&mut RemoteRegion, &mut u64)) {
    let (mut world, link) = World::connected(fixture, 2);
    let other = world.link(1);
    let target = world.grant(link, B, LEN, granted);
    let source = world.ends[A].source(1, 64);
    let (mut remote, mut offset) = (target.remote.clone(), 0);
    tamper(&mut remote, &mut offset);
    world.post(A, link, 1, write(&source, 0..64, &remote, offset), Some(5));
    assert_refused(&mut world, link, &[&target]);
    world.assert_alive(other);
}

/// Pumps until the link has ended for the reason it should, and checks that the regions are still zero.
fn assert_refused(world: &mut World<'_>, link: super::Link, regions: &[&Granted]) {
    for reason in world.both_ended(link) {
        assert!(matches!(reason, Disconnect::AccessRefused(_)), "{reason:?}");
    }
    assert_eq!(world.ends[A].sent(link.0[A]), [(5, Err(WorkError::RemoteAccess))]);
    for granted in regions {
        assert!(granted.bytes(0..LEN).iter().all(|byte| *byte == 0), "memory was touched");
    }
    for end in [A, B] {
        let last = world.ends[end].seen.iter().rposition(|seen| {
            matches!(seen, crate::Completion::Sent { link: id, .. } | crate::Completion::Immediate { link: id, .. }
                if *id == link.0[end])
        });
        let ended = world.ends[end]
            .seen
            .iter()
            .position(|seen| matches!(seen, crate::Completion::Disconnected { link: id, .. } if *id == link.0[end]));
        assert!(last < ended, "something came after the end: {:?}", world.ends[end].seen);
        world.ends[end].endpoint.close(link.0[end]);
    }
}

/// A key that was never given out.
pub fn refuses_a_wrong_key(fixture: &mut dyn Fixture) {
    refuses(fixture, Access::PeerWrite, |remote, _| remote.key ^= 0x5A5A_0000_0000_0001);
}

/// A place behind the region, though the poster claims that the region is longer.
pub fn refuses_an_offset_beyond_the_region(fixture: &mut dyn Fixture) {
    refuses(fixture, Access::PeerWrite, |remote, offset| {
        remote.len = 1 << 40;
        *offset = LEN as u64;
    });
}

/// A range that begins inside the region and ends behind it.
pub fn refuses_a_length_beyond_the_region(fixture: &mut dyn Fixture) {
    refuses(fixture, Access::PeerWrite, |_, offset| *offset = LEN as u64 - 63);
}

/// An offset so large that its sum with the length wraps around.
pub fn refuses_an_offset_that_overflows(fixture: &mut dyn Fixture) {
    refuses(fixture, Access::PeerWrite, |remote, offset| {
        remote.len = u64::MAX;
        *offset = u64::MAX - 31;
    });
}

/// A right that was not granted, though the poster claims that it was.
pub fn refuses_a_write_to_a_read_only_grant(fixture: &mut dyn Fixture) {
    refuses(fixture, Access::PeerRead, |remote, _| remote.access = Access::PeerWrite);
}

/// A read is bounded as a write is.
pub fn refuses_a_read_beyond_the_region(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 2);
    let granted = world.grant(link, B, LEN, Access::PeerRead);
    let here = world.ends[A].source(1, 64);
    let read = Op::Read {
        remote: Remote { region: &granted.remote, offset: LEN as u64 - 1 },
        target: Target { region: &here, offset: 0, len: 64 },
    };
    world.post(A, link, 0, read, Some(5));
    assert_refused(&mut world, link, &[&granted]);
    let mut bytes = vec![0; 64];
    here.read(0, &mut bytes).expect("in bounds");
    assert_eq!(bytes, pattern(1, 64));
}

/// A key opens nothing on a link that it was not granted over.
pub fn refuses_the_key_of_another_link(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let other = world.link(1);
    let target = world.grant(other, B, LEN, Access::PeerWrite);
    let source = world.ends[A].source(1, 64);
    let stolen = RemoteRegion { link: link.0[A], ..target.remote.clone() };
    world.post(A, link, 0, write(&source, 0..64, &stolen, 0), Some(5));
    assert_refused(&mut world, link, &[&target]);
    world.perform(A, other, write(&source, 0..64, &target.remote, 0));
    world.assert_alive(other);
}

/// When an end has seen the link end, its memory is its own: work of other lanes that was under way moves no byte.
pub fn nothing_reaches_memory_after_the_end(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 2);
    let len = 1 << 20;
    let target = world.grant(link, B, len, Access::PeerWrite);
    let source = world.ends[A].source(1, len);
    let forged = RemoteRegion { key: !target.remote.key, ..target.remote.clone() };
    for part in 0..8 {
        let range = part * len / 8..(part + 1) * len / 8;
        let offset = range.start as u64;
        world.post(A, link, 1, write(&source, range, &target.remote, offset), None);
        if part == 3 {
            world.post(A, link, 0, write(&source, 0..64, &forged, 0), None);
        }
    }
    world.until("the granter sees the end", |ends| ends[B].ended(link.0[B]).is_some());
    let then = target.bytes(0..len);
    world.both_ended(link);
    world.linger(Duration::from_millis(20));
    assert!(target.bytes(0..len) == then, "a write came after the end");
}

/// A region is granted up to the access that it was allocated with.
pub fn grants_no_more_than_was_allocated(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    for (allocated, asked) in
        [(Access::Local, Access::PeerRead), (Access::Local, Access::PeerWrite), (Access::PeerRead, Access::PeerWrite)]
    {
        let region = world.ends[B].device.allocate(64, allocated, None).expect("allocate");
        assert!(world.ends[B].endpoint.grant(link.0[B], &region, asked).is_err(), "{asked:?} of {allocated:?}");
    }
    let region = world.ends[B].device.allocate(64, Access::PeerWrite, None).expect("allocate");
    assert!(world.ends[B].endpoint.grant(link.0[B], &region, Access::PeerRead).is_ok());
}
