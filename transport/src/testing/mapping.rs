//! Peer memory that is mapped: producing is sending. Providers that do not map pass by having nothing to show.

use super::Fixture;
use super::world::{A, B, World, notify, pattern};
use crate::{Access, AddressSpace, Placement, page_bytes};

/// Bytes stored to a mapped region are there when the immediate that announces them is seen.
pub fn shows_what_was_produced_in_a_mapped_region(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let maps = world.ends[A].device.properties().maps_peer_memory;
    let granted = world.grant(link, B, 10_000, Access::PeerWrite);
    assert_eq!(granted.remote.mapped.is_some(), maps);
    let Some(mapped) = &granted.remote.mapped else { return };
    assert_eq!(mapped.len(), 10_000);
    assert!(mapped.writable());
    for round in 0..20 {
        mapped.write(0, &pattern(round, 10_000)).expect("in bounds");
        world.post(A, link, 0, notify(round as u32), None);
        world.until("the immediate arrives", |ends| ends[B].immediates(link.0[B]).len() as u64 > round);
        assert_eq!(granted.bytes(0..10_000), pattern(round, 10_000));
    }
}

/// What was granted for reading can be read in place, and not stored to.
pub fn maps_a_read_only_grant_read_only(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let granted = world.grant(link, B, 5000, Access::PeerRead);
    let Some(mapped) = &granted.remote.mapped else { return };
    granted.region.write(0, &pattern(1, 5000)).expect("in bounds");
    world.flush(B, link, 1);
    let mut bytes = vec![0; 5000];
    mapped.read(0, &mut bytes).expect("in bounds");
    assert_eq!(bytes, pattern(1, 5000));
    assert!(!mapped.writable());
    assert!(mapped.write(0, b"no").is_err());
}

/// Imported regions land where they are told to, so that those of several links form one array.
pub fn maps_regions_side_by_side(fixture: &mut dyn Fixture) {
    let mut world = World::new(fixture);
    if !world.ends[A].device.properties().maps_peer_memory {
        return;
    }
    let page = page_bytes();
    let space = AddressSpace::reserve(3 * page).expect("address space");
    let mut imported = Vec::new();
    for rank in 0..3 {
        let link = world.link(1);
        let region = world.ends[B].device.allocate(page, Access::PeerRead, None).expect("allocate");
        region.write(0, &pattern(rank as u64, page)).expect("fill");
        let descriptor = world.describe(link, B, &region, Access::PeerRead);
        let place = Placement::take(&space, rank * page, page).expect("a free place");
        let remote = world.ends[A].endpoint.import(link.0[A], &descriptor, Some(place)).expect("import");
        world.flush(B, link, 1);
        imported.push(remote);
    }
    // SAFETY: the three placed regions are alive in `imported`, cover the space, and nobody stores to them now.
    let array = unsafe { std::slice::from_raw_parts(space.base().as_ptr(), 3 * page) };
    for rank in 0..3 {
        assert!(array[rank * page..(rank + 1) * page] == pattern(rank as u64, page), "rank {rank}");
    }
    drop(imported);
}
