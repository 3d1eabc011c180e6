//! A random mixture of everything at once, checked end to end.

use super::Fixture;
use super::world::{A, B, World, notify, pattern, write, write_immediate};
use crate::{Access, Completion, Op, Remote, Source};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::hash::{DefaultHasher, Hash, Hasher};

const SLOTS: usize = 64;
const SLOT_BYTES: usize = 20_000;

/// [`soak`] of a length that suits a test run.
pub fn survives_a_random_soak(fixture: &mut dyn Fixture) {
    soak(fixture, 4000, 1);
}

/// Sends `transfers` writes of random size, offset and lane into the free slots of a region, each announced by an
/// immediate that names its slot, and compares checksums on arrival.
pub fn soak(fixture: &mut dyn Fixture, transfers: usize, seed: u64) {
    let lanes = fixture.device().properties().max_lanes.min(4);
    let (mut world, link) = World::connected(fixture, lanes);
    let inline = world.ends[A].device.properties().max_inline;
    let target = world.grant(link, B, SLOTS * SLOT_BYTES, Access::PeerWrite);
    let source = world.ends[A].source(0, SLOTS * SLOT_BYTES);
    world.ends[B].seen.clear();
    let mut random = SmallRng::seed_from_u64(seed);
    let mut free: Vec<usize> = (0..SLOTS).collect();
    let mut expected = vec![None; SLOTS];
    let (mut started, mut finished) = (0, 0);
    while finished < transfers {
        if started < transfers && !free.is_empty() {
            let slot = free.swap_remove(random.random_range(0..free.len()));
            let largest = if random.random_bool(0.1) { SLOT_BYTES } else { 600 };
            let len = random.random_range(0..=largest);
            let start = slot * SLOT_BYTES + random.random_range(0..=SLOT_BYTES - len);
            let lane = random.random_range(0..lanes);
            let bytes = pattern(random.random(), len);
            expected[slot] = Some((start, len, checksum(&bytes), lane));
            source.write(start, &bytes).expect("in bounds");
            let remote = Remote { region: &target.remote, offset: start as u64 };
            if len <= inline && random.random_bool(0.5) {
                world.post(A, link, lane, Op::Write { source: Source::Inline(&bytes), remote }, None);
                world.post(A, link, lane, notify(slot as u32), None);
            } else if random.random_bool(0.5) {
                world.post(A, link, lane, write(&source, start..start + len, &target.remote, start as u64), Some(1));
                world.post(A, link, lane, notify(slot as u32), None);
            } else {
                let range = start..start + len;
                let op = write_immediate(&source, range, &target.remote, start as u64, slot as u32);
                world.post(A, link, lane, op, None);
            }
            started += 1;
        }
        if free.is_empty() || started == transfers || random.random_bool(0.2) {
            world.until("something arrives", |ends| {
                ends[A].seen.clear();
                !ends[B].seen.is_empty()
            });
        }
        for completion in std::mem::take(&mut world.ends[B].seen) {
            let Completion::Immediate { lane, immediate, .. } = completion else { panic!("{completion:?}") };
            let slot = immediate as usize;
            let (start, len, sum, expected_lane) = expected[slot].take().expect("announced once");
            assert_eq!(lane, expected_lane);
            assert_eq!(checksum(&target.bytes(start..start + len)), sum, "slot {slot}, {len} bytes at {start}");
            free.push(slot);
            finished += 1;
        }
    }
    assert_eq!(free.len(), SLOTS);
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}
