//! Peers that write what they like into the memory that a link shares.

use super::{SPEC, Victim, sealed};
use crate::shm::endpoint::ShmEndpoint;
use crate::shm::rings;
use crate::shm::socket::Received;
use crate::{Completion, DeviceOptions, Disconnect, Endpoint, LinkId, LinkSpec, Op, Side, Source, Work, page_bytes};
use proptest::prelude::*;
use std::time::{Duration, Instant};

#[test]
fn nonsense_in_a_ring_ends_its_link_alone() {
    let mut victim = Victim::new();
    let (_socket, rings) = victim.let_in();
    let every_byte = vec![0xA5; rings::size(1)];
    assert_eq!(rustix::io::pwrite(&rings, &every_byte, 0), Ok(every_byte.len()));
    assert!(matches!(victim.ended(), Disconnect::Protocol(_)));
    victim.assert_unharmed();
}

/// An honest link of the victim, made before the rogue's.
struct Bystander {
    endpoint: ShmEndpoint,
    ours: LinkId,
    theirs: LinkId,
    sent: u32,
}

impl Bystander {
    fn new(victim: &mut Victim) -> Self {
        let mut endpoint = ShmEndpoint::new(DeviceOptions::default()).unwrap();
        let spec = LinkSpec { lanes: 2, ..SPEC };
        let (ours, of_ours) = victim.endpoint.open(spec).unwrap();
        let (theirs, of_theirs) = endpoint.open(LinkSpec { side: Side::Active, ..spec }).unwrap();
        victim.endpoint.connect(ours, &of_theirs, Duration::from_secs(10)).unwrap();
        endpoint.connect(theirs, &of_ours, Duration::from_secs(10)).unwrap();
        let mut seen = Vec::new();
        victim.until(|_| {
            endpoint.poll(&mut seen).unwrap();
            seen.contains(&Completion::Connected { link: theirs })
        });
        Self { endpoint, ours, theirs, sent: 0 }
    }

    /// An immediate goes each way, on each lane.
    fn assert_alive(&mut self, victim: &mut Victim) {
        for lane in 0..2 {
            self.sent += 1;
            let immediate = self.sent;
            let op = Op::WriteImmediate { source: Source::Inline(&[]), remote: None, immediate };
            let chain = [Work { op, signal: None }];
            self.endpoint.post(self.theirs, lane, &chain).unwrap();
            victim.endpoint.post(self.ours, lane, &chain).unwrap();
            let arrived = |link| Completion::Immediate { link, lane, immediate };
            let mut seen = Vec::new();
            victim.until(|victim| {
                self.endpoint.poll(&mut seen).unwrap();
                seen.contains(&arrived(self.theirs)) && victim.seen.contains(&arrived(self.ours))
            });
        }
    }
}

#[test]
fn what_came_before_the_nonsense_arrives_and_then_the_end() {
    let mut victim = Victim::new();
    let mut bystander = Bystander::new(&mut victim);
    let (_socket, rings) = victim.let_in();
    victim.seen.clear();
    // The ring of what the rogue writes lies behind two farewells and the count of what was consumed.
    let words = [1_u64 << 32 | 77, 3 << 32 | 78];
    for (entry, word) in words.into_iter().enumerate().rev() {
        assert_eq!(rustix::io::pwrite(&rings, &word.to_le_bytes(), 3 * 128 + 8 * entry as u64), Ok(8));
    }
    assert!(matches!(victim.ended(), Disconnect::Protocol(_)));
    let link = victim.link;
    assert_eq!(victim.seen[0], Completion::Immediate { link, lane: 0, immediate: 77 });
    assert_eq!(victim.seen.len(), 2);
    bystander.assert_alive(&mut victim);
}

#[test]
fn a_rogue_that_scribbles_over_the_doorbell_delays_others_by_a_moment() {
    let mut victim = Victim::new();
    let mut bystander = Bystander::new(&mut victim);
    let rings = sealed(rings::size(1));
    let socket = victim.prove(SPEC.secret, &sealed(page_bytes()), &rings);
    let Received::Packet(_, fds) = victim.answer(&socket) else { panic!("dropped") };
    for word in [0_u32, 1, 2, u32::MAX] {
        let page: Vec<u8> = word.to_le_bytes().repeat(page_bytes() / 4);
        let op = Op::WriteImmediate { source: Source::Inline(&[]), remote: None, immediate: word };
        let start = Instant::now();
        assert_eq!(rustix::io::pwrite(&fds[0], &page, 0), Ok(page.len()));
        bystander.endpoint.post(bystander.theirs, 0, &[Work { op, signal: None }]).unwrap();
        let arrived = Completion::Immediate { link: bystander.ours, lane: 0, immediate: word };
        while !victim.seen.contains(&arrived) {
            victim.endpoint.wait(Duration::from_secs(60)).unwrap();
            victim.endpoint.poll(&mut victim.seen).unwrap();
        }
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    bystander.assert_alive(&mut victim);
}

#[test]
fn a_consumer_that_lies_about_what_it_took_ends_the_link() {
    let mut victim = Victim::new();
    let (_socket, rings) = victim.let_in();
    let every_byte = vec![0xA5; rings::size(1)];
    assert_eq!(rustix::io::pwrite(&rings, &every_byte, 0), Ok(every_byte.len()));
    let op = Op::WriteImmediate { source: Source::Inline(&[]), remote: None, immediate: 1 };
    let chain = [Work { op, signal: None }];
    while victim.endpoint.post(victim.link, 0, &chain).is_ok() {}
    assert!(matches!(victim.ended(), Disconnect::Protocol(_)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Words in places where words are: farewells, counts, entries; some of them what an honest peer would write.
    #[test]
    fn whatever_a_rogue_scribbles_over_the_rings_only_its_own_link_ends(
        words in prop::collection::vec((0..rings::size(1) as u64 / 8, 0..4_u64, prop_oneof![0..200_u64, any::<u64>()]), 1..40),
        own in 0..3_usize,
    ) {
        let mut victim = Victim::new();
        let mut bystander = Bystander::new(&mut victim);
        let (_socket, rings) = victim.let_in();
        let op = Op::WriteImmediate { source: Source::Inline(&[]), remote: None, immediate: 1 };
        for (place, lap, value) in words {
            let word = lap << 32 | value;
            prop_assert_eq!(rustix::io::pwrite(&rings, &word.to_le_bytes(), place * 8), Ok(8));
            for _ in 0..own {
                let _ = victim.endpoint.post(victim.link, 0, &[Work { op, signal: None }]);
            }
            victim.endpoint.poll(&mut victim.seen).unwrap();
        }
        let ends = victim.seen.iter().filter(|seen| matches!(seen, Completion::Disconnected { .. }));
        prop_assert!(ends.count() <= 1);
        bystander.assert_alive(&mut victim);
    }
}
