//! Memory that the caller owns is as good as a provider's own, where the provider takes it at all.

use super::Fixture;
use super::memory::{DeviceMemory, MappedFile};
use super::world::{A, B, World, pattern, work, write, write_immediate};
use crate::{Access, Memory, Op, PostError, Region, Remote, Source, Target, TransportError, page_bytes};
use std::sync::Arc;

const LEN: usize = 10_000;

/// Registers a file's memory at an end; none where the provider, or the kernel below it, does not take such memory, which
/// it says with what to do.
fn register(world: &World<'_>, end: usize, file: &Arc<MappedFile>, access: Access) -> Option<Region> {
    match world.ends[end].device.register(file.clone(), access) {
        Ok(region) => Some(region),
        Err(TransportError::Unsupported { what, hint }) => {
            assert!(!what.is_empty() && !hint.is_empty());
            None
        }
        Err(TransportError::Registration { hint, .. }) if !file.writable() => {
            assert!(!hint.is_empty());
            None
        }
        Err(error) => panic!("register: {error}"),
    }
}

/// Bytes that its owner puts into registered memory are sent, and those that are read arrive where the owner looks.
pub fn sends_from_memory_of_the_caller_and_receives_into_it(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let file = Arc::new(MappedFile::new(LEN));
    let Some(region) = register(&world, A, &file, Access::Local) else { return };
    assert_eq!(region.len(), LEN);
    let target = world.grant(link, B, LEN, Access::PeerWrite);
    file.write(0, &pattern(1, LEN));
    world.perform(A, link, write(&region, 11..LEN, &target.remote, 7));
    world.flush(A, link, 1);
    assert!(target.bytes(7..LEN - 4) == pattern(1, LEN)[11..]);
    target.region.write(0, &pattern(2, LEN)).expect("in bounds");
    let remote = Remote { region: &target.remote, offset: 0 };
    world.perform(A, link, Op::Read { remote, target: Target { region: &region, offset: 0, len: LEN } });
    assert!(file.read(0, LEN) == pattern(2, LEN));
}

/// A peer writes granted memory of the caller's, which its owner reads through another mapping; and reads it.
pub fn lets_peers_reach_memory_of_the_caller(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let file = Arc::new(MappedFile::new(LEN));
    let Some(region) = register(&world, B, &file, Access::PeerWrite) else { return };
    let granted = world.grant_region(link, B, region, Access::PeerWrite);
    let source = world.ends[A].source(3, LEN);
    world.post(A, link, 0, write_immediate(&source, 0..9000, &granted.remote, 1000, 1), None);
    world.until("the immediate arrives", |ends| !ends[B].immediates(link.0[B]).is_empty());
    assert!(file.read(1000, 9000) == pattern(3, LEN)[..9000]);
    assert!(file.read(0, 1000).iter().all(|byte| *byte == 0));
    let file = Arc::new(MappedFile::read_only(LEN));
    file.write(0, &pattern(4, LEN));
    let Some(region) = register(&world, B, &file, Access::PeerRead) else { return };
    let granted = world.grant_region(link, B, region, Access::PeerRead);
    let remote = Remote { region: &granted.remote, offset: 1 };
    world.perform(A, link, Op::Read { remote, target: Target { region: &source, offset: 0, len: LEN - 1 } });
    let mut bytes = vec![0; LEN - 1];
    source.read(0, &mut bytes).expect("in bounds");
    assert!(bytes == pattern(4, LEN)[1..]);
}

/// Memory without bytes, memory that does not begin at a page, and memory for peers to write that cannot be written.
pub fn refuses_to_register_what_cannot_be(fixture: &mut dyn Fixture) {
    let device = fixture.device();
    let part = |start| Arc::new(MappedFile::new(4 * page_bytes()).starting_at(start));
    for access in [Access::Local, Access::PeerRead, Access::PeerWrite] {
        for bad in [part(4 * page_bytes()), part(1), part(page_bytes() + 64)] {
            assert!(device.register(bad.clone(), access).is_err(), "{} bytes at {:p}", bad.len(), bad.base());
        }
    }
    assert!(device.register(Arc::new(MappedFile::read_only(LEN)), Access::PeerWrite).is_err());
    let Ok(part) = device.register(part(page_bytes()), Access::Local) else { return };
    assert_eq!(part.len(), 3 * page_bytes());
}

/// What read-only memory holds can be sent; nothing is read into it. A registration is granted up to its access only, and
/// ranges end where it does.
pub fn grants_no_more_than_was_registered(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let file = Arc::new(MappedFile::new(LEN));
    for (registered, asked) in
        [(Access::Local, Access::PeerRead), (Access::Local, Access::PeerWrite), (Access::PeerRead, Access::PeerWrite)]
    {
        let Some(region) = register(&world, B, &file, registered) else { continue };
        assert!(world.ends[B].endpoint.grant(link.0[B], &region, asked).is_err(), "{asked:?} of {registered:?}");
    }
    let Some(short) = register(&world, A, &Arc::new(MappedFile::read_only(100)), Access::Local) else { return };
    let target = world.grant(link, B, LEN, Access::PeerWrite);
    let remote = Remote { region: &target.remote, offset: 0 };
    let beyond = Op::Write { source: Source::Region(&short, 50, 51), remote };
    let into = Op::Read { remote, target: Target { region: &short, offset: 0, len: 100 } };
    for op in [beyond, into] {
        let refused = world.ends[A].endpoint.post(link.0[A], 0, &[work(op)]);
        assert!(matches!(refused, Err(PostError::Invalid(_))), "{op:?}: {refused:?}");
    }
    world.perform(A, link, write(&short, 0..100, &target.remote, 0));
    world.assert_alive(link);
}

/// The caller may drop its own handle at once; the memory goes when the grant and the region have gone.
pub fn keeps_registered_memory_until_nothing_uses_it(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    let file = Arc::new(MappedFile::new(LEN));
    let memory = Arc::downgrade(&file);
    let Some(region) = register(&world, B, &file, Access::PeerWrite) else { return };
    drop(file);
    let granted = world.grant_region(link, B, region, Access::PeerWrite);
    let remote = granted.remote;
    drop(granted.region);
    let source = world.ends[A].source(5, LEN);
    world.perform(A, link, write(&source, 0..LEN, &remote, 0));
    world.flush(A, link, 1);
    assert!(memory.upgrade().expect("granted still").read(0, LEN) == pattern(5, LEN));
    world.ends[B].endpoint.close(link.0[B]);
    world.until("the link has ended", |ends| ends[A].ended(link.0[A]).is_some());
    world.ends[A].endpoint.close(link.0[A]);
    world.until("the memory is given back", |_| memory.upgrade().is_none());
}

/// Device memory that the provider cannot reach is refused at each door, by an error that says so, and never touched.
pub fn touches_no_device_memory(fixture: &mut dyn Fixture) {
    let (mut world, link) = World::connected(fixture, 1);
    for access in [Access::Local, Access::PeerRead, Access::PeerWrite] {
        let refused = world.ends[A].device.register(Arc::new(DeviceMemory::new(LEN)), access);
        let refused = refused.expect_err("no device is behind it");
        let typed = match &refused {
            TransportError::DeviceMemory => true,
            TransportError::Registration { hint, .. } | TransportError::Unsupported { hint, .. } => !hint.is_empty(),
            _ => false,
        };
        assert!(typed, "{refused:?}");
    }
    let device = Region::new(Arc::new(DeviceMemory::new(LEN)));
    assert!(world.ends[A].endpoint.grant(link.0[A], &device, Access::PeerRead).is_err());
    let target = world.grant(link, B, LEN, Access::PeerWrite);
    let remote = Remote { region: &target.remote, offset: 0 };
    let local = Target { region: &device, offset: 0, len: 8 };
    let ops = [
        write(&device, 0..LEN, &target.remote, 0),
        write_immediate(&device, 0..1, &target.remote, 0, 1),
        Op::Read { remote, target: local },
        Op::FetchAdd { remote, target: local, add: 1 },
    ];
    for op in ops {
        let refused = world.ends[A].endpoint.post(link.0[A], 0, &[work(op)]);
        assert!(matches!(refused, Err(PostError::Unsupported { .. } | PostError::Invalid(_))), "{op:?}: {refused:?}");
    }
    world.assert_alive(link);
}
