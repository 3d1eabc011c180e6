//! What only sockets can do wrong: ports, full buffers, mutual waits, allocation.

use super::Tcp;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};
use stepmesh_transport::testing::{
    A, B, End, Fixture, Link, World, notify, pattern, spec, work, write, write_immediate,
};
use stepmesh_transport::{
    Access, Completion, DeviceOptions, Disconnect, LinkSpec, Op, PostError, Provider, Remote, Side, Source, Target,
    Work, WorkError,
};

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let options = DeviceOptions { port: address.port(), ..Default::default() };
    let device = stepmesh_transport::open(Provider::Tcp, &options).unwrap();
    let error = device.endpoint().err().expect("the port is taken").to_string();
    assert!(error.contains(&address.to_string()), "{error}");
}

#[test]
fn an_address_that_nobody_can_dial_is_refused() {
    let options = DeviceOptions { address: [0, 0, 0, 0].into(), ..Default::default() };
    let error = stepmesh_transport::open(Provider::Tcp, &options).err().expect("refused").to_string();
    assert!(error.contains("0.0.0.0"), "{error}");
}

#[test]
fn links_over_ipv6_work_too() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return;
    }
    let address = std::net::Ipv6Addr::LOCALHOST.into();
    let mut tcp = Tcp { options: DeviceOptions { address, ..Default::default() } };
    let (mut world, link) = World::connected(&mut tcp, 2);
    world.assert_alive(link);
}

#[test]
fn both_ends_of_a_link_may_be_one_endpoint() {
    let mut tcp = Tcp::default();
    let device = tcp.device();
    let mut end = End { endpoint: device.endpoint().unwrap(), device, seen: Vec::new() };
    let active = spec(2, Side::Active);
    let (a, of_a) = end.endpoint.open(active).unwrap();
    let (b, of_b) = end.endpoint.open(LinkSpec { side: Side::Passive, ..active }).unwrap();
    end.endpoint.connect(a, &of_b, Duration::from_secs(10)).unwrap();
    end.endpoint.connect(b, &of_a, Duration::from_secs(10)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while end.connected(a) + end.connected(b) < 2 {
        assert!(Instant::now() < deadline);
        end.poll();
        end.endpoint.wait(Duration::from_millis(10)).unwrap();
    }
}

#[test]
fn a_peer_that_never_reads_blocks_nobody_else() {
    let mut tcp = Tcp::default();
    let device = tcp.device();
    let mut deaf = End { endpoint: device.endpoint().unwrap(), device, seen: Vec::new() };
    let (mut world, other) = World::connected(&mut tcp, 1);
    let active = spec(1, Side::Active);
    let (link, of_a) = world.ends[A].endpoint.open(active).unwrap();
    let (deaf_link, of_deaf) = deaf.endpoint.open(LinkSpec { side: Side::Passive, ..active }).unwrap();
    world.ends[A].endpoint.connect(link, &of_deaf, Duration::from_secs(10)).unwrap();
    deaf.endpoint.connect(deaf_link, &of_a, Duration::from_secs(10)).unwrap();
    world.until("the deaf peer is connected", |ends| {
        deaf.poll();
        ends[A].connected(link) == 1
    });
    let len = 1 << 20;
    let region = deaf.device.allocate(len, Access::PeerWrite, None).unwrap();
    let granted = deaf.endpoint.grant(deaf_link, &region, Access::PeerWrite).unwrap();
    let remote = world.ends[A].endpoint.import(link, &granted, None).unwrap();
    let source = world.ends[A].source(1, len);
    let fill = |world: &mut World<'_>| {
        while world.ends[A].endpoint.post(link, 0, &[work(write(&source, 0..len, &remote, 0))]).is_ok() {}
    };
    fill(&mut world);
    let start = Instant::now();
    for _ in 0..20 {
        world.assert_alive(other);
        fill(&mut world);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let refused = world.ends[A].endpoint.post(link, 0, &[work(notify(1))]);
    assert_eq!(refused, Err(PostError::WouldBlock));
    let start = Instant::now();
    let mut waits = 0;
    while start.elapsed() < Duration::from_millis(200) {
        world.ends[A].endpoint.wait(Duration::from_millis(20)).unwrap();
        world.ends[A].poll();
        waits += 1;
    }
    assert!(waits < 30, "a blocked lane keeps the endpoint awake: {waits} waits");
    assert!(deaf.ended(deaf_link).is_none() && world.ends[A].ended(link).is_none());
}

#[test]
fn what_was_still_queued_at_the_close_arrives() {
    let mut tcp = Tcp::default();
    let (mut world, link) = World::connected(&mut tcp, 2);
    let len = 16 << 20;
    let target = world.grant(link, B, 2 * len, Access::PeerWrite);
    let source = world.ends[A].source(1, 2 * len);
    for lane in 0..2 {
        let range = usize::from(lane) * len..usize::from(lane + 1) * len;
        let offset = range.start as u64;
        world.post(A, link, lane, write_immediate(&source, range, &target.remote, offset, 1), None);
    }
    world.ends[A].endpoint.close(link.0[A]);
    world.until("the peer sees the end", |ends| ends[B].ended(link.0[B]).is_some());
    assert_eq!(world.ends[B].ended(link.0[B]), Some(&Disconnect::Closed));
    assert_eq!(world.ends[B].immediates(link.0[B]).len(), 2);
    assert!(target.bytes(0..2 * len) == pattern(1, 2 * len));
}

#[test]
fn large_reads_both_ways_do_not_wait_for_each_other() {
    let mut tcp = Tcp::default();
    let (mut world, link) = World::connected(&mut tcp, 1);
    let len = 4 << 20;
    let granted = [B, A].map(|granter| world.grant(link, granter, len, Access::PeerRead));
    let here = [A, B].map(|end| world.ends[end].device.allocate(4 * len, Access::Local, None).unwrap());
    for end in [A, B] {
        granted[end].region.write(0, &pattern(end as u64, len)).unwrap();
        for i in 0..4 {
            let remote = Remote { region: &granted[end].remote, offset: 0 };
            let target = Target { region: &here[end], offset: i * len, len };
            world.post(end, link, 0, Op::Read { remote, target }, Some(i as u64));
        }
    }
    world.until("all reads are done", |ends| (0..2).all(|end| ends[end].sent(link.0[end]).len() == 4));
    for end in [A, B] {
        assert_eq!(world.ends[end].sent(link.0[end]), [0, 1, 2, 3].map(|token| (token, Ok(()))));
        let mut bytes = vec![0; 4 * len];
        here[end].read(0, &mut bytes).unwrap();
        assert!(bytes.chunks(len).all(|read| read == pattern(end as u64, len)));
    }
}

#[test]
fn a_refused_write_without_a_signal_is_reported_too() {
    let mut tcp = Tcp::default();
    let (mut world, link) = World::connected(&mut tcp, 1);
    let target = world.grant(link, B, 64, Access::PeerRead);
    let source = world.ends[A].source(1, 64);
    world.post(A, link, 0, write(&source, 0..64, &target.remote, 0), None);
    world.both_ended(link);
    let refused = Err(WorkError::RemoteAccess);
    assert_eq!(world.ends[A].sent(link.0[A]), [(u64::MAX, refused)]);
}

#[test]
fn a_read_before_a_refused_write_is_done_only_with_its_bytes() {
    for len in [1000, 32 << 20] {
        let mut tcp = Tcp::default();
        let (mut world, link) = World::connected(&mut tcp, 1);
        let granted = world.grant(link, B, len, Access::PeerRead);
        granted.region.write(0, &pattern(1, len)).unwrap();
        let here = world.ends[A].device.allocate(len, Access::Local, None).unwrap();
        let remote = Remote { region: &granted.remote, offset: 0 };
        let read = Op::Read { remote, target: Target { region: &here, offset: 0, len } };
        let bad = write(&here, 0..1, &granted.remote, 0);
        let chain = [Work { op: read, signal: Some(1) }, Work { op: bad, signal: Some(2) }];
        world.ends[A].endpoint.post(link.0[A], 0, &chain).unwrap();
        world.both_ended(link);
        let sent = world.ends[A].sent(link.0[A]);
        assert_eq!(sent[1], (2, Err(WorkError::RemoteAccess)));
        let mut bytes = vec![0; len];
        here.read(0, &mut bytes).unwrap();
        assert_eq!(sent[0].1.is_ok(), bytes == pattern(1, len), "{sent:?}");
    }
}

/// Counts what this thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all is the system allocator's own; counting touches nothing of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_steady_state_allocates_nothing() {
    let mut tcp = Tcp::default();
    let (mut world, link) = World::connected(&mut tcp, 2);
    let len = 200_000;
    let granted = [B, A].map(|granter| world.grant(link, granter, len, Access::PeerWrite));
    let sources = [A, B].map(|end| world.ends[end].source(end as u64, len));
    for end in &mut world.ends {
        end.seen.reserve(10_000);
    }
    let round = |world: &mut World<'_>| {
        for end in [A, B] {
            let remote = Remote { region: &granted[end].remote, offset: 0 };
            let payload = Op::Write { source: Source::Region(&sources[end], 0, len), remote };
            let header = Op::WriteImmediate { source: Source::Inline(&[1; 256]), remote: Some(remote), immediate: 1 };
            let target = Target { region: &sources[end], offset: 0, len: 1000 };
            let chain = [work(payload), Work { op: header, signal: Some(1) }, work(Op::Read { remote, target })];
            for lane in 0..2 {
                world.ends[end].endpoint.post(link.0[end], lane, &chain).unwrap();
            }
            arrives(world, link, 1 - end, end);
        }
    };
    for _ in 0..50 {
        round(&mut world);
    }
    let before = ALLOCATIONS.get();
    for _ in 0..200 {
        round(&mut world);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
}

/// Pumps until `to` has seen an immediate and `from` a signal on both lanes, and forgets them.
fn arrives(world: &mut World<'_>, link: Link, to: usize, from: usize) {
    let seen = |end: &End, id| {
        let of_link = |seen: &&Completion| matches!(seen, Completion::Immediate { link, .. } | Completion::Sent { link, .. } if *link == id);
        end.seen.iter().filter(of_link).count()
    };
    world.until("both lanes are through", |ends| {
        seen(&ends[to], link.0[to]) == 2 && seen(&ends[from], link.0[from]) == 2
    });
    world.ends.iter_mut().for_each(|end| end.seen.clear());
}
