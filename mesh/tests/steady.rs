//! The steady state allocates nothing: transfers are counted allocation by allocation, driven by the caller and by
//! progress threads.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use stepmesh_mesh::control::{LocalControl, LocalScheduler};
use stepmesh_mesh::scheduler::SchedulerOptions;
use stepmesh_mesh::threaded::{AttentionEngine, FfnEngine, ProgressOptions};
use stepmesh_mesh::{
    AttentionMesh, Batch, FfnMesh, MemberOptions, MeshError, PartSpec, Policy, Request, SlotLayout, Ticket,
};
use stepmesh_proto::Part;
use stepmesh_transport::{Clock, Device, DeviceOptions, Endpoint, Provider};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
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

type Parts = (MemberOptions, Arc<dyn Device>, Box<dyn Endpoint>, Box<LocalControl>, Clock);

fn parts(provider: Provider, scheduler: &LocalScheduler) -> Parts {
    let specs = vec![PartSpec { row_bytes: 512, max_rows: 32 }, PartSpec { row_bytes: 4, max_rows: 32 }];
    let mut options = MemberOptions::new(SlotLayout::new(3, specs.clone(), specs).unwrap(), "echo");
    options.lanes = 2;
    options.stripe_bytes = 1024;
    let device = stepmesh_transport::open(provider, &DeviceOptions::default()).unwrap();
    let endpoint = device.endpoint().unwrap();
    let control = scheduler.session(endpoint.waker());
    (options, device, endpoint, Box::new(control), Clock::system())
}

/// One attention and two FFN instances.
fn deployment(provider: Provider) -> (AttentionMesh, [FfnMesh; 2]) {
    let scheduler = LocalScheduler::new(SchedulerOptions::new(1, 2)).unwrap();
    let (options, device, endpoint, control, clock) = parts(provider, &scheduler);
    let attention = AttentionMesh::with_endpoint(options, device, endpoint, control, clock).unwrap();
    let ffn = [0, 1].map(|_| {
        let (options, device, endpoint, control, clock) = parts(provider, &scheduler);
        FfnMesh::with_endpoint(options, device, endpoint, control, clock).unwrap()
    });
    (attention, ffn)
}

fn request(rows: u32) -> [Part; 2] {
    let part = |key, row_bytes| Part { key, rows, row_bytes, ..Part::default() };
    [part(1, 512), part(2, 4)]
}

fn fill(batch: &mut Batch) {
    for segment in &mut batch.segments {
        let rows = segment.rows() as u32;
        for part in 0..2 {
            let (input, output) = segment.split(part, part);
            output[..input.len()].copy_from_slice(input);
        }
        segment.set_reply(&request(rows)).unwrap();
    }
}

/// Allocations of everybody in so many rounds, after as many to warm up.
fn count(rounds: u32, mut round: impl FnMut(u32)) -> usize {
    (0..rounds).for_each(&mut round);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (0..rounds).for_each(&mut round);
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

fn driven_by_the_caller(provider: Provider) -> usize {
    let (mut attention, mut ffn) = deployment(provider);
    while !attention.is_complete() || !attention.is_linked() || ffn.iter().any(|ffn| !ffn.is_complete()) {
        attention.poll().unwrap();
        ffn.iter_mut().for_each(|ffn| ffn.poll().unwrap());
    }
    while attention.next_event().is_some() || ffn.iter_mut().any(|ffn| ffn.next_event().is_some()) {}
    count(2000, |round| {
        let tickets: [Ticket; 3] = std::array::from_fn(|microbatch| {
            let mut buffer = attention.acquire(microbatch as u16).unwrap();
            buffer.part_mut(0)[0] = round as u8;
            let request = Request { group: round % 60, parts: &request(round % 33), ..Request::default() };
            attention.push_pull(buffer, request).unwrap()
        });
        for ticket in tickets {
            while attention.status(ticket) == stepmesh_mesh::TicketStatus::Pending {
                for ffn in &mut ffn {
                    ffn.poll().unwrap();
                    while let Some(mut batch) = ffn.try_next_batch(Policy::All) {
                        fill(&mut batch);
                        ffn.respond(batch).unwrap();
                    }
                }
                attention.poll().unwrap();
            }
            let reply = attention.take(ticket).unwrap();
            assert!(round.is_multiple_of(33) || reply.part(1, 0)[0] == round as u8);
        }
    })
}

fn driven_by_threads(provider: Provider) -> usize {
    let (attention, ffn) = deployment(provider);
    let mut attention = AttentionEngine::start(attention, ProgressOptions::default()).unwrap();
    let servers = ffn.map(|ffn| {
        let mut engine = FfnEngine::start(ffn, ProgressOptions::default()).unwrap();
        std::thread::spawn(move || {
            loop {
                while engine.next_event().is_some() {}
                let Some(mut batch) = engine.next_batch(Policy::All, Duration::from_secs(5)).unwrap() else { continue };
                let is_last = batch.segments[0].app()[0] == 1;
                fill(&mut batch);
                engine.respond(batch).unwrap();
                if is_last {
                    // The reply is on its way when the queue is empty; a dropped engine would cut it off.
                    std::thread::sleep(Duration::from_millis(200));
                    return;
                }
            }
        })
    });
    attention.wait_complete(Duration::from_secs(20)).unwrap();
    while attention.next_event().is_some() {}
    let allocations = count(1000, |round| {
        let tickets: [Ticket; 3] = std::array::from_fn(|microbatch| {
            let mut buffer = attention.acquire(microbatch as u16).unwrap();
            buffer.part_mut(0)[0] = round as u8;
            let request = Request { group: round % 60, parts: &request(round % 33), ..Request::default() };
            attention.push_pull(buffer, request).unwrap()
        });
        for ticket in tickets {
            let reply = attention.wait(ticket, Duration::from_secs(20)).unwrap();
            assert!(round.is_multiple_of(33) || reply.part(1, 0)[0] == round as u8);
        }
    });
    let buffer = attention.acquire(0).unwrap();
    let last = attention.push_pull(buffer, Request { app: [1; 16], ..Request::default() }).unwrap();
    match attention.wait(last, Duration::from_secs(20)) {
        Ok(_) | Err(MeshError::Ticket(_)) => {}
        Err(error) => panic!("{error}"),
    }
    servers.into_iter().for_each(|server| server.join().unwrap());
    allocations
}

/// One test, so that nothing else of the process allocates meanwhile.
#[test]
fn the_steady_state_allocates_nothing() {
    for provider in [Provider::Shm, Provider::Tcp] {
        assert_eq!(driven_by_the_caller(provider), 0, "{provider}, driven by the caller");
        assert_eq!(driven_by_threads(provider), 0, "{provider}, driven by threads");
    }
}
