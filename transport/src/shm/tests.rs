//! What only this provider can get wrong: rogue peers on the socket and in shared memory.

use super::doorbell::OwnDoorbell;
use super::endpoint::ShmEndpoint;
use super::hello::Transcript;
use super::link::State;
use super::memory;
use super::rings;
use super::socket::{Dialled, Received, Socket};
use super::wire::{GrantDescriptor, LinkDescriptor, Packet, Reject};
use crate::{
    Access, Completion, DeviceOptions, Disconnect, Endpoint, LinkId, LinkSecret, LinkSpec, Op, Side, Source, Work,
    page_bytes,
};
use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

mod scribbling;

const SPEC: LinkSpec = LinkSpec { incarnation: 7, secret: LinkSecret([3; 16]), lanes: 1, side: Side::Passive };

/// An honest passive endpoint, with one link that is to be dialled.
struct Victim {
    endpoint: ShmEndpoint,
    link: LinkId,
    descriptor: LinkDescriptor,
    seen: Vec<Completion>,
}

impl Victim {
    fn new() -> Self {
        let options = DeviceOptions { hello_timeout: Duration::from_millis(200), ..DeviceOptions::default() };
        let mut endpoint = ShmEndpoint::new(options).unwrap();
        let (link, descriptor) = endpoint.open(SPEC).unwrap();
        let descriptor = LinkDescriptor::decode(&descriptor).unwrap();
        let peer = LinkDescriptor { side: Side::Active, socket: [0; 16], ..descriptor };
        endpoint.connect(link, &peer.encode(), Duration::from_secs(10)).unwrap();
        Self { endpoint, link, descriptor, seen: Vec::new() }
    }

    fn dial(&self) -> Socket {
        match Socket::dial(&self.descriptor.socket).unwrap() {
            Dialled::Connected(socket) => socket,
            Dialled::Busy => panic!("the backlog is full"),
        }
    }

    /// Polls until `done`, or panics after a while.
    fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < Duration::from_secs(10), "in vain; seen: {:?}", self.seen);
            self.endpoint.poll(&mut self.seen).unwrap();
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Polls until something has come for a peer's socket.
    fn answer(&mut self, socket: &Socket) -> Received {
        let mut answer = Received::Nothing;
        self.until(|_| {
            answer = socket.receive().unwrap();
            !matches!(answer, Received::Nothing)
        });
        answer
    }

    fn ended(&mut self) -> Disconnect {
        let link = self.link;
        let mut found = None;
        self.until(|victim| {
            found = victim.seen.iter().find_map(|seen| match seen {
                Completion::Disconnected { link: of, reason } if *of == link => Some(reason.clone()),
                _ => None,
            });
            found.is_some()
        });
        found.unwrap()
    }

    /// Does the hello as far as the proof, with what the rogue likes to bring.
    fn prove(&mut self, secret: LinkSecret, doorbell: &OwnedFd, rings: &OwnedFd) -> Socket {
        let socket = self.dial();
        let hello =
            Packet::Hello { token: self.descriptor.token, incarnation: SPEC.incarnation, lanes: 1, nonce: [9; 16] };
        socket.send(&hello.encode(), &[]).unwrap();
        let Received::Packet(bytes, _) = self.answer(&socket) else { panic!("dropped") };
        let Packet::Challenge { nonce, .. } = Packet::decode(&bytes).unwrap() else { panic!("no challenge") };
        let transcript = Transcript {
            token: self.descriptor.token,
            incarnation: SPEC.incarnation,
            lanes: 1,
            active_nonce: [9; 16],
            passive_nonce: nonce,
        };
        let proof = Packet::Proof { proof: transcript.prove(&secret, Side::Active) };
        socket.send(&proof.encode(), &[doorbell.as_fd(), rings.as_fd()]).unwrap();
        socket
    }

    /// A rogue that was let in, and the link's memory that it holds.
    fn let_in(&mut self) -> (Socket, OwnedFd) {
        let rings = sealed(rings::size(1));
        let socket = self.prove(SPEC.secret, &sealed(page_bytes()), &rings);
        assert!(matches!(self.answer(&socket), Received::Packet(bytes, _) if bytes == Packet::Welcome.encode()));
        (socket, rings)
    }

    /// Checks that the endpoint still takes an honest peer, on a new link.
    fn assert_unharmed(&mut self) {
        let mut honest = ShmEndpoint::new(DeviceOptions::default()).unwrap();
        let (ours, of_ours) = self.endpoint.open(SPEC).unwrap();
        let (theirs, of_theirs) = honest.open(LinkSpec { side: Side::Active, ..SPEC }).unwrap();
        self.endpoint.connect(ours, &of_theirs, Duration::from_secs(10)).unwrap();
        honest.connect(theirs, &of_ours, Duration::from_secs(10)).unwrap();
        let mut seen = Vec::new();
        let op = Op::WriteImmediate { source: Source::Inline(&[]), remote: None, immediate: 5 };
        self.until(|victim| {
            honest.poll(&mut seen).unwrap();
            victim.seen.contains(&Completion::Connected { link: ours }) && honest.post(theirs, 0, &[]).is_ok()
        });
        honest.post(theirs, 0, &[Work { op, signal: None }]).unwrap();
        self.until(|victim| victim.seen.contains(&Completion::Immediate { link: ours, lane: 0, immediate: 5 }));
    }
}

fn sealed(len: usize) -> OwnedFd {
    let fd = memory::create("test", len).unwrap();
    memory::seal(&fd, false).unwrap();
    fd
}

fn unsealed(len: usize) -> OwnedFd {
    memory::create("test", len).unwrap()
}

#[test]
fn link_memory_that_could_shrink_is_refused() {
    let mut victim = Victim::new();
    let socket = victim.prove(SPEC.secret, &sealed(page_bytes()), &unsealed(rings::size(1)));
    let reject = Packet::Reject(Reject::Memory).encode();
    assert!(matches!(victim.answer(&socket), Received::Packet(bytes, _) if bytes == reject));
    assert!(matches!(victim.ended(), Disconnect::Rejected(what) if what.contains("sealed")));
    victim.assert_unharmed();
}

#[test]
fn link_memory_of_another_size_is_refused() {
    let mut victim = Victim::new();
    let _socket = victim.prove(SPEC.secret, &sealed(page_bytes()), &sealed(page_bytes()));
    assert!(matches!(victim.ended(), Disconnect::Rejected(what) if what.contains("bytes instead of")));
}

#[test]
fn a_doorbell_that_could_shrink_is_refused() {
    let mut victim = Victim::new();
    let _socket = victim.prove(SPEC.secret, &unsealed(page_bytes()), &sealed(rings::size(1)));
    assert!(matches!(victim.ended(), Disconnect::Rejected(_)));
}

#[test]
fn a_doorbell_that_is_no_memory_is_refused() {
    let mut victim = Victim::new();
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let _socket = victim.prove(SPEC.secret, &pipe, &sealed(rings::size(1)));
    assert!(matches!(victim.ended(), Disconnect::Rejected(_)));
}

#[test]
fn who_cannot_prove_the_secret_is_dropped_and_the_link_goes_on_waiting() {
    let mut victim = Victim::new();
    let socket = victim.prove(LinkSecret([4; 16]), &sealed(page_bytes()), &sealed(rings::size(1)));
    let reject = Packet::Reject(Reject::Proof).encode();
    assert!(matches!(victim.answer(&socket), Received::Packet(bytes, _) if bytes == reject));
    assert_eq!(victim.seen, []);
    let _let_in = victim.let_in();
    assert_eq!(victim.seen, [Completion::Connected { link: victim.link }]);
}

#[test]
fn a_region_that_could_shrink_is_not_imported() {
    let mut victim = Victim::new();
    let (socket, _rings) = victim.let_in();
    let grant = GrantDescriptor { key: 1, len: 10, access: Access::PeerWrite };
    socket.send(&Packet::Grant(grant).encode(), &[unsealed(page_bytes()).as_fd()]).unwrap();
    assert!(victim.endpoint.import(victim.link, &grant.encode(), None).is_err());
    assert!(matches!(victim.ended(), Disconnect::Protocol(what) if what.contains("sealed")));
    victim.assert_unharmed();
}

#[test]
fn a_region_smaller_than_it_claims_is_not_imported() {
    for len in [page_bytes() as u64 + 1, u64::MAX] {
        let mut victim = Victim::new();
        let (socket, _rings) = victim.let_in();
        let grant = GrantDescriptor { key: 1, len, access: Access::PeerWrite };
        socket.send(&Packet::Grant(grant).encode(), &[sealed(page_bytes()).as_fd()]).unwrap();
        assert!(matches!(victim.ended(), Disconnect::Protocol(_)));
    }
}

#[test]
fn more_grants_than_are_allowed_end_the_link() {
    let mut victim = Victim::new();
    let (socket, _rings) = victim.let_in();
    let region = sealed(page_bytes());
    for key in 0..=super::connection::MAX_GRANTS as u64 {
        let grant = GrantDescriptor { key, len: 1, access: Access::PeerRead };
        victim.until(|_| socket.send(&Packet::Grant(grant).encode(), &[region.as_fd()]).is_ok());
    }
    assert!(matches!(victim.ended(), Disconnect::Protocol(_)));
}

#[test]
fn a_passive_peer_that_never_answers_is_given_up_in_time() {
    let mut victim = Victim::new();
    let silent = super::socket::Listener::bind().unwrap();
    let (link, descriptor) = victim.endpoint.open(LinkSpec { side: Side::Active, ..SPEC }).unwrap();
    let descriptor = LinkDescriptor::decode(&descriptor).unwrap();
    let peer = LinkDescriptor { side: Side::Passive, socket: silent.name(), ..descriptor };
    victim.endpoint.connect(link, &peer.encode(), Duration::from_millis(100)).unwrap();
    victim.link = link;
    assert!(matches!(victim.ended(), Disconnect::NotConnected(why) if why.contains("in time")));
    victim.assert_unharmed();
}

#[test]
fn garbage_after_the_hello_ends_the_link() {
    for garbage in [b"garbage".to_vec(), vec![0; 4096], Packet::Welcome.encode()] {
        let mut victim = Victim::new();
        let (socket, _rings) = victim.let_in();
        socket.send(&garbage, &[]).unwrap();
        assert!(matches!(victim.ended(), Disconnect::Protocol(_) | Disconnect::PeerGone(_)));
        victim.assert_unharmed();
    }
}

#[test]
fn garbage_before_the_hello_disturbs_nobody() {
    let mut victim = Victim::new();
    let strangers: Vec<_> = (0..10).map(|_| victim.dial()).collect();
    for (index, stranger) in strangers.iter().enumerate() {
        stranger.send(&vec![index as u8; 1 + 300 * index], &[]).unwrap();
    }
    for stranger in &strangers {
        assert!(matches!(victim.answer(stranger), Received::HungUp));
    }
    victim.let_in();
}

#[test]
fn the_silent_are_dropped_in_time() {
    let mut victim = Victim::new();
    let stranger = victim.dial();
    let start = Instant::now();
    assert!(matches!(victim.answer(&stranger), Received::HungUp));
    assert!(start.elapsed() >= Duration::from_millis(190));
    assert!(victim.endpoint.candidates.is_empty());
    // One that speaks once and then no more.
    let stranger = victim.dial();
    let hello = Packet::Hello { token: victim.descriptor.token, incarnation: 7, lanes: 1, nonce: [9; 16] };
    stranger.send(&hello.encode(), &[]).unwrap();
    assert!(matches!(victim.answer(&stranger), Received::Packet(..)));
    assert!(matches!(victim.answer(&stranger), Received::HungUp));
    assert!(victim.endpoint.candidates.is_empty());
    victim.let_in();
}

#[test]
fn a_crowd_of_the_silent_keeps_no_peer_out() {
    let mut victim = Victim::new();
    let crowd: Vec<_> = (0..300).map(|_| victim.dial()).collect();
    let socket = victim.let_in();
    assert!(victim.endpoint.candidates.len() < 80);
    drop((crowd, socket));
}

#[test]
fn a_peer_that_proves_itself_early_is_welcomed_when_this_side_connects() {
    let mut victim = Victim::new();
    victim.endpoint.links[0].state = State::Opened(None);
    let socket = victim.prove(SPEC.secret, &sealed(page_bytes()), &sealed(rings::size(1)));
    victim.until(|victim| matches!(victim.endpoint.links[0].state, State::Opened(Some(_))));
    assert_eq!(victim.seen, []);
    let peer = LinkDescriptor { side: Side::Active, ..victim.descriptor };
    victim.endpoint.connect(victim.link, &peer.encode(), Duration::from_secs(1)).unwrap();
    assert!(matches!(victim.answer(&socket), Received::Packet(..)));
    victim.until(|victim| !victim.seen.is_empty());
    assert_eq!(victim.seen, [Completion::Connected { link: victim.link }]);
}

#[test]
fn what_is_granted_for_reading_cannot_be_mapped_for_writing() {
    for allocated in [Access::PeerRead, Access::PeerWrite] {
        let region = memory::SharedMemory::allocate(100, allocated, None).unwrap();
        let fd = region.share(Access::PeerRead).unwrap();
        memory::check(&fd, page_bytes()).unwrap();
        assert!(memory::Mapping::new(fd.as_fd(), page_bytes(), true, None).is_err());
        assert!(memory::Mapping::new(fd.as_fd(), page_bytes(), false, None).is_ok());
    }
}

#[test]
fn a_doorbell_rung_before_the_sleep_does_not_let_it_sleep() {
    let own = OwnDoorbell::create().unwrap();
    let start = Instant::now();
    assert!(
        own.sleep(Duration::from_secs(10), || {
            crate::Wake::wake(&own);
            false
        }) || start.elapsed() < Duration::from_secs(5)
    );
    assert!(own.take_wake());
    assert!(!own.take_wake());
}

#[test]
fn a_hang_up_ends_a_wait_soon_spinning_or_not() {
    for spin in [Duration::ZERO, Duration::from_secs(60)] {
        let mut victim = Victim::new();
        victim.endpoint.options.spin = spin;
        let let_in = victim.let_in();
        let hangs_up = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(let_in);
        });
        let start = Instant::now();
        while !victim.seen.iter().any(|seen| matches!(seen, Completion::Disconnected { .. })) {
            victim.endpoint.wait(Duration::from_secs(60)).unwrap();
            victim.endpoint.poll(&mut victim.seen).unwrap();
        }
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(50) && took < Duration::from_secs(2), "{took:?}");
        assert!(matches!(victim.ended(), Disconnect::PeerGone(_)));
        hangs_up.join().unwrap();
    }
}

#[test]
fn what_a_dead_peer_had_sent_arrives_before_its_end() {
    let mut victim = Victim::new();
    let (socket, rings) = victim.let_in();
    let word = (1u64 << 32 | 77).to_le_bytes();
    // Behind two farewells and the count of what was consumed, 128 bytes each.
    assert_eq!(rustix::io::pwrite(&rings, &word, 3 * 128), Ok(8));
    drop(socket);
    victim.ended();
    let link = victim.link;
    assert_eq!(victim.seen[1], Completion::Immediate { link, lane: 0, immediate: 77 });
    assert!(matches!(victim.seen[2], Completion::Disconnected { .. }));
}

#[test]
fn all_grants_can_be_made_before_the_peer_looks() {
    let mut victim = Victim::new();
    let _let_in = victim.let_in();
    let memory = memory::SharedMemory::allocate(1, Access::PeerRead, None).unwrap();
    let region = crate::Region::new(std::sync::Arc::new(memory));
    for _ in 0..super::connection::MAX_GRANTS {
        victim.endpoint.grant(victim.link, &region, Access::PeerRead).unwrap();
    }
    assert!(victim.endpoint.grant(victim.link, &region, Access::PeerRead).is_err());
}

#[test]
fn a_descriptor_that_is_no_memfd_is_found_out() {
    let file = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    assert!(memory::check(&file, 0).is_err());
}

proptest! {
    #[test]
    fn packets_of_any_bytes_are_read_or_refused(bytes: Vec<u8>, kind in 0u8..8) {
        let _ = Packet::decode(&bytes);
        let _ = LinkDescriptor::decode(&bytes);
        let framed = [b"SMSH\x02", &[kind][..], &bytes[..]].concat();
        if let Ok(packet) = Packet::decode(&framed) {
            prop_assert_eq!(packet.encode(), framed);
        }
    }
}
