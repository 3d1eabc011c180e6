//! A mesh whose tensors are in GPU memory, on the double of the driver: nothing but streams and the driver touches them, and
//! a request costs a header. Both sides in one process, and in two.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod step;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_fake_cuda::harness::{allocated, process, with_driver};
use stepmesh_mesh::control::{ConnectOptions, Control, GrpcControl, LocalScheduler};
use stepmesh_mesh::scheduler::{SchedulerOptions, ServeOptions, spawn};
use stepmesh_mesh::{
    AttentionMesh, AttentionStep, FfnMesh, FfnStep, MemberOptions, PartSpec, Policy, Request, SlotLayout, Transfer,
};
use stepmesh_proto::{Dtype, Part};
use stepmesh_transport::cuda::{Context, DeviceMemory, Gates, PinnedMemory, Span, Stream, beside};
use stepmesh_transport::{Clock, Device, DeviceOptions, Endpoint, GateSet, HostMemory, Provider, Region};

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
    host_of(BYTES)
}

fn host_of(bytes: usize) -> Region {
    let region = Region::new(Arc::new(HostMemory::allocate(bytes, None).unwrap()));
    PinnedMemory::pin(&Context::open(0).unwrap(), region).unwrap()
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
    let state = Region::new(DeviceMemory::allocate(&context, BYTES).unwrap());
    mesh.wait_complete(PATIENCE).unwrap();
    for round in 0..rounds {
        let bytes: Vec<u8> = (0..BYTES).map(|at| (at as u32 * 31 + round) as u8).collect();
        tensor.write(0, &bytes).unwrap();
        let mut buffer = mesh.acquire((round % u32::from(SLOTS)) as u16).unwrap();
        let place = buffer.part_place(0).unwrap();
        assert_eq!((place.0.on_device(), buffer.part_mut(0).is_empty()), (on_device, on_device));
        stream.copy(&whole(&tensor), &whole(&state)).unwrap();
        stream.copy(&whole(&state), &span(place)).unwrap();
        gate.announce(&stream).unwrap();
        let started = Instant::now();
        while !gates.take(0) {
            assert!(started.elapsed() < PATIENCE);
        }
        let ticket = mesh.push_pull(buffer, Request { group: round, parts: &[part()], ..Request::default() }).unwrap();
        // What follows on the stream waits for the reply, which the CPU does not touch.
        gate.pass(&stream).unwrap();
        let reply = mesh.wait(ticket, PATIENCE).unwrap();
        let place = reply.part_place(0, 0).unwrap();
        assert_eq!((place.0.on_device(), reply.part(0, 0).is_empty()), (on_device, on_device));
        stream.copy(&span(place), &whole(&state)).unwrap();
        stream.copy(&whole(&state), &whole(&result)).unwrap();
        gates.open(0);
        finish(&stream);
        let mut found = vec![0; BYTES];
        result.read(0, &mut found).unwrap();
        assert!(found == bytes, "round {round}");
    }
}

fn in_one_process(
    provider: Provider,
    ffn_side: impl FnOnce(FfnMesh) + Send,
    attention_side: impl FnOnce(AttentionMesh),
) {
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
        scope.spawn(|| ffn_side(ffn));
        attention_side(attention);
    });
    assert_eq!(allocated(), 0, "all device memory is freed");
}

#[test]
fn tensors_stay_in_device_memory_between_two_threads() {
    with_driver("tensors_stay_in_device_memory_between_two_threads", || {
        in_one_process(Provider::Shm, |mesh| serve(mesh, ROUNDS, true), |mesh| ask(mesh, ROUNDS, true));
    });
}

#[test]
fn over_tcp_tensors_are_staged_in_pinned_memory() {
    with_driver("over_tcp_tensors_are_staged_in_pinned_memory", || {
        in_one_process(Provider::Tcp, |mesh| serve(mesh, ROUNDS, false), |mesh| ask(mesh, ROUNDS, false));
    });
}

type Parts = (MemberOptions, Arc<dyn Device>, Box<dyn Endpoint>, Box<dyn Control>, Clock);

/// A member of a scheduler that it reaches by a socket.
fn remote(url: &str) -> Parts {
    let (device, endpoint) = device(Provider::Shm);
    let waker = endpoint.waker();
    let control = GrpcControl::connect(ConnectOptions::new(url), Box::new(move || waker.wake())).unwrap();
    (options(), device, endpoint, Box::new(control), Clock::system())
}

/// The other process of the tests below.
#[test]
fn the_other_process_serves() {
    let Ok(url) = std::env::var("STEPMESH_GPU_SCHEDULER") else { return };
    let (options, device, endpoint, control, clock) = remote(&url);
    let mesh = FfnMesh::with_endpoint(options, device, endpoint, control, clock).unwrap();
    match std::env::var("STEPMESH_GPU_REPLAYS") {
        Ok(replays) => step::serve(mesh, replays.parse().unwrap()),
        Err(_) => serve(mesh, ROUNDS, true),
    }
}

/// The attention side, and a process that serves it: so many replays of a step, or request by request.
fn in_two_processes(replays: Option<u32>, attention: impl FnOnce(AttentionMesh)) {
    let scheduler = spawn(ServeOptions::new(SchedulerOptions::new(1, 1))).unwrap();
    let (mut other, _directory) = process("the_other_process_serves", true);
    other.env("STEPMESH_GPU_SCHEDULER", scheduler.url());
    other.envs(replays.map(|replays| ("STEPMESH_GPU_REPLAYS", replays.to_string())));
    let mut other = other.spawn().unwrap();
    let (options, device, endpoint, control, clock) = remote(&scheduler.url());
    attention(AttentionMesh::with_endpoint(options, device, endpoint, control, clock).unwrap());
    assert!(other.wait().unwrap().success());
}

#[test]
fn tensors_stay_in_device_memory_between_two_processes() {
    with_driver("tensors_stay_in_device_memory_between_two_processes", || {
        in_two_processes(None, |mesh| ask(mesh, ROUNDS, true));
    });
}

#[test]
fn a_captured_step_is_replayed_between_two_threads() {
    with_driver("a_captured_step_is_replayed_between_two_threads", || {
        in_one_process(Provider::Shm, |mesh| step::serve(mesh, 1000), |mesh| step::ask(mesh, 1000));
    });
}

#[test]
fn a_captured_step_is_replayed_between_two_processes() {
    with_driver("a_captured_step_is_replayed_between_two_processes", || {
        in_two_processes(Some(200), |mesh| step::ask(mesh, 200));
    });
}

#[test]
fn a_replay_whose_peer_is_lost_ends_and_says_so() {
    with_driver("a_replay_whose_peer_is_lost_ends_and_says_so", || {
        in_one_process(Provider::Shm, |mesh| step::serve_and_vanish(mesh, 3, 10), |mesh| step::ask_until_lost(mesh, 3));
    });
}

#[test]
fn steps_that_make_no_sense_are_refused() {
    with_driver("steps_that_make_no_sense_are_refused", || {
        let gates = Arc::new(Gates::new(&Context::open(0).unwrap(), 2).unwrap());
        let transfer = || Transfer { microbatch: 0, group: 0, parts: vec![part()], app: [0; 16] };
        for count in [0, 3] {
            let transfers = || vec![transfer(); count];
            assert!(
                AttentionStep::new(gates.clone(), transfers()).is_err_and(|error| error.to_string().contains("gates"))
            );
            assert!(FfnStep::new(gates.clone(), vec![0; count]).is_err());
        }
        let mut step = AttentionStep::new(gates.clone(), vec![transfer()]).unwrap();
        assert_eq!(step.parts_mut(0), Some(&mut vec![part()]));
        assert_eq!(step.parts_mut(1), None);
    });
}
