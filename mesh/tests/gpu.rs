//! A mesh whose tensors are in GPU memory, on the double of the driver: nothing but streams and the driver touches them, and
//! a request costs a header. Both sides in one process, and in two.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_fake_cuda::harness::{allocated, process, with_double};
use stepmesh_mesh::control::{ConnectOptions, Control, GrpcControl, LocalScheduler};
use stepmesh_mesh::scheduler::{SchedulerOptions, ServeOptions, spawn};
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, PartSpec, Policy, Request, SlotLayout};
use stepmesh_proto::{Dtype, Part};
use stepmesh_transport::cuda::{Context, DeviceMemory, Gates, Span, Stream, beside};
use stepmesh_transport::{Clock, Device, DeviceOptions, Endpoint, HostMemory, Provider, Region};

const PATIENCE: Duration = Duration::from_secs(30);
const BYTES: usize = 4096;
const ROUNDS: u32 = 200;
const SLOTS: u16 = 3;

fn options() -> MemberOptions {
    let spec = PartSpec { row_bytes: BYTES as u32, max_rows: 1 };
    MemberOptions::new(SlotLayout::new(SLOTS, vec![spec], vec![spec]).unwrap(), "gpu")
}

fn part() -> Part {
    Part { key: 0, dtype: Dtype::Bytes, rows: 1, row_bytes: BYTES as u32, offset: 0 }
}

fn device(provider: Provider) -> (Arc<dyn Device>, Box<dyn Endpoint>) {
    let device =
        beside(&Context::open(0).unwrap(), stepmesh_transport::open(provider, &DeviceOptions::default()).unwrap());
    let endpoint = device.endpoint().unwrap();
    (device, endpoint)
}

fn span((region, range): (Region, Range<usize>)) -> Span {
    Span::new(&region, range.start..range.start + BYTES).unwrap()
}

fn host() -> Region {
    Region::new(Arc::new(HostMemory::allocate(BYTES, None).unwrap()))
}

fn whole(region: &Region) -> Span {
    Span::new(region, 0..BYTES).unwrap()
}

fn finish(stream: &Stream) {
    let started = Instant::now();
    while !stream.is_idle().unwrap() {
        assert!(started.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

/// The FFN side: its stream copies each request to where the reply goes, through a tensor of its own.
fn serve(mut mesh: FfnMesh, rounds: u32, on_device: bool) {
    let context = Context::open(0).unwrap();
    let (stream, tensor) =
        (Stream::new(&context).unwrap(), Region::new(DeviceMemory::allocate(&context, BYTES).unwrap()));
    mesh.wait_complete(PATIENCE).unwrap();
    assert_eq!(mesh.part_array(0, 0).is_none(), on_device);
    let mut served = 0;
    let started = Instant::now();
    while served < rounds {
        assert!(started.elapsed() < PATIENCE);
        while mesh.next_event().is_some() {}
        let Some(mut batch) = mesh.next_batch(Policy::All, Duration::from_millis(50)).unwrap() else { continue };
        for segment in &mut batch.segments {
            let (request, reply) = (segment.part_place(0).unwrap(), segment.reply_place(0).unwrap());
            assert_eq!((request.0.on_device(), reply.0.on_device()), (on_device, on_device));
            assert_eq!(segment.part(0).is_empty(), on_device, "the CPU sees no device memory");
            stream.copy(&span(request), &whole(&tensor)).unwrap();
            stream.copy(&whole(&tensor), &span(reply)).unwrap();
            segment.set_reply(&[part()]).unwrap();
        }
        finish(&stream);
        mesh.respond(batch).unwrap();
        served += 1;
    }
    // The last replies are under way until the other side has seen them.
    while mesh.attention() > 0 && mesh.is_complete() && started.elapsed() < PATIENCE {
        mesh.poll().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The attention side: a stream produces in the slot, a gate says when; another opens when the reply is there.
fn ask(mut mesh: AttentionMesh, rounds: u32, on_device: bool) {
    let context = Context::open(0).unwrap();
    let (stream, gates) = (Stream::new(&context).unwrap(), Gates::new(&context, 1).unwrap());
    let gate = gates.gate(0).unwrap();
    let (tensor, result) = (host(), host());
    mesh.wait_complete(PATIENCE).unwrap();
    for round in 0..rounds {
        let bytes: Vec<u8> = (0..BYTES).map(|at| (at as u32 * 31 + round) as u8).collect();
        tensor.write(0, &bytes).unwrap();
        let mut buffer = mesh.acquire((round % u32::from(SLOTS)) as u16).unwrap();
        let place = buffer.part_place(0).unwrap();
        assert_eq!((place.0.on_device(), buffer.part_mut(0).is_empty()), (on_device, on_device));
        stream.copy(&whole(&tensor), &span(place)).unwrap();
        gate.announce(&stream).unwrap();
        let started = Instant::now();
        while !gate.take() {
            assert!(started.elapsed() < PATIENCE);
        }
        let ticket = mesh.push_pull(buffer, Request { group: round, parts: &[part()], ..Request::default() }).unwrap();
        // What follows on the stream waits for the reply, which the CPU does not touch.
        gate.pass(&stream).unwrap();
        let reply = mesh.wait(ticket, PATIENCE).unwrap();
        let place = reply.part_place(0, 0).unwrap();
        assert_eq!((place.0.on_device(), reply.part(0, 0).is_empty()), (on_device, on_device));
        stream.copy(&span(place), &whole(&result)).unwrap();
        gate.open();
        finish(&stream);
        let mut found = vec![0; BYTES];
        result.read(0, &mut found).unwrap();
        assert!(found == bytes, "round {round}");
    }
}

fn in_one_process(provider: Provider, on_device: bool) {
    let scheduler = LocalScheduler::new(SchedulerOptions::new(1, 1)).unwrap();
    let member = || {
        let (device, endpoint) = device(provider);
        let control = Box::new(scheduler.session(endpoint.waker()));
        (options(), device, endpoint, control as Box<dyn Control>, Clock::system())
    };
    let (options, device, endpoint, control, clock) = member();
    let ffn = FfnMesh::with_endpoint(options, device, endpoint, control, clock).unwrap();
    let (options, device, endpoint, control, clock) = member();
    let attention = AttentionMesh::with_endpoint(options, device, endpoint, control, clock).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| serve(ffn, ROUNDS, on_device));
        ask(attention, ROUNDS, on_device);
    });
    assert_eq!(allocated(), 0, "all device memory is freed");
}

#[test]
fn tensors_stay_in_device_memory_between_two_threads() {
    with_double("tensors_stay_in_device_memory_between_two_threads", || in_one_process(Provider::Shm, true));
}

#[test]
fn over_tcp_tensors_are_staged_in_pinned_memory() {
    with_double("over_tcp_tensors_are_staged_in_pinned_memory", || in_one_process(Provider::Tcp, false));
}

/// The other process of the test below.
#[test]
fn the_other_process_serves() {
    let Ok(url) = std::env::var("STEPMESH_GPU_SCHEDULER") else { return };
    let (device, endpoint) = device(Provider::Shm);
    let waker = endpoint.waker();
    let control = GrpcControl::connect(ConnectOptions::new(url), Box::new(move || waker.wake())).unwrap();
    serve(
        FfnMesh::with_endpoint(options(), device, endpoint, Box::new(control), Clock::system()).unwrap(),
        ROUNDS,
        true,
    );
}

#[test]
fn tensors_stay_in_device_memory_between_two_processes() {
    with_double("tensors_stay_in_device_memory_between_two_processes", || {
        let scheduler = spawn(ServeOptions::new(SchedulerOptions::new(1, 1))).unwrap();
        let (mut other, _directory) = process("the_other_process_serves", true);
        let mut other = other.env("STEPMESH_GPU_SCHEDULER", scheduler.url()).spawn().unwrap();
        let (device, endpoint) = device(Provider::Shm);
        let waker = endpoint.waker();
        let control = ConnectOptions::new(scheduler.url());
        let control = GrpcControl::connect(control, Box::new(move || waker.wake())).unwrap();
        let mesh =
            AttentionMesh::with_endpoint(options(), device, endpoint, Box::new(control), Clock::system()).unwrap();
        ask(mesh, ROUNDS, true);
        assert!(other.wait().unwrap().success());
    });
}
