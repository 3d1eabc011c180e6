//! The steady state of a shm link allocates nothing: posting, polling and an empty wait, counted thread by thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;
use stepmesh_transport::testing::{A, B, Fixture, World, notify, write_immediate};
use stepmesh_transport::{Access, Completion, Device, DeviceOptions, Provider, Work};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

struct Shm;

impl Fixture for Shm {
    fn device(&mut self) -> std::sync::Arc<dyn Device> {
        stepmesh_transport::open(Provider::Shm, &DeviceOptions::default()).expect("a shm device")
    }
}

#[test]
fn the_steady_state_allocates_nothing() {
    let mut fixture = Shm;
    let (world, link) = World::connected(&mut fixture, 2);
    let mut world = world;
    let target = world.grant(link, B, 4096, Access::PeerWrite);
    let source = world.ends[A].source(1, 4096);
    let ends = &mut world.ends;
    let mut seen: Vec<Completion> = Vec::with_capacity(1024);
    let mut round = |immediate: u32| {
        for lane in 0..2 {
            let write = write_immediate(&source, 0..4096, &target.remote, 0, immediate);
            let chain = [Work { op: write, signal: Some(1) }, Work { op: notify(2), signal: None }];
            ends[A].endpoint.post(link.0[A], lane, &chain).unwrap();
        }
        for end in ends.iter_mut() {
            end.endpoint.poll(&mut seen).unwrap();
        }
        assert_eq!(seen.len(), 2 + 4);
        seen.clear();
        ends[A].endpoint.wait(Duration::from_micros(if immediate.is_multiple_of(64) { 30 } else { 0 })).unwrap();
    };
    (0..10).for_each(&mut round);
    let before = ALLOCATIONS.get();
    (0..10_000).for_each(&mut round);
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
