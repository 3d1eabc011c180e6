//! The steady state of a verbs link allocates nothing: posting, polling and an empty wait, counted thread by thread.
//! Passes with a line that says so where there is no RDMA device.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;
use stepmesh_transport::testing::{A, B, Fixture, World, notify, write_immediate};
use stepmesh_transport::{Access, Completion, Device, DeviceOptions, Provider, Work, verbs};

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

struct Verbs;

impl Fixture for Verbs {
    fn device(&mut self) -> std::sync::Arc<dyn Device> {
        stepmesh_transport::open(Provider::Verbs, &DeviceOptions::default()).expect("an RDMA device")
    }
}

#[test]
fn the_steady_state_allocates_nothing() {
    if let Err(why) = verbs::device_names() {
        assert!(std::env::var_os("STEPMESH_REQUIRE_RDMA").is_none(), "{why}");
        return println!("skipped: {why}");
    }
    let mut fixture = Verbs;
    let (mut world, link) = World::connected(&mut fixture, 2);
    let target = world.grant(link, B, 256, Access::PeerWrite);
    let source = world.ends[A].source(1, 256);
    let ends = &mut world.ends;
    let mut seen: Vec<Completion> = Vec::with_capacity(1024);
    let mut round = |immediate: u32| {
        for lane in 0..2 {
            let write = write_immediate(&source, 0..256, &target.remote, 0, immediate);
            let chain = [Work { op: write, signal: Some(1) }, Work { op: notify(2), signal: None }];
            ends[A].endpoint.post(link.0[A], lane, &chain).unwrap();
        }
        while seen.len() < 2 + 4 {
            for end in ends.iter_mut() {
                end.endpoint.poll(&mut seen).unwrap();
            }
            ends[B].endpoint.wait(Duration::from_micros(100)).unwrap();
        }
        seen.clear();
    };
    (0..10).for_each(&mut round);
    let before = ALLOCATIONS.get();
    (0..1000).for_each(&mut round);
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
