//! Members that break the protocol, on purpose or at random.

use super::world::{World, hello};
use crate::scheduler::{SequenceId, Session};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use stepmesh_proto::control::{
    BarrierEnter, FromMember, GenerateRequest, Hello, LinkDown, LinkGrants, LinkOffer, LinkUp, MemberStats, Role,
    SequenceEvent, Token, from_member::Body as Said, sequence_event::Body as Progress, to_member::Body,
};

fn offer(incarnation: u32, bytes: usize) -> Said {
    Said::LinkOffer(LinkOffer { incarnation, descriptor: vec![0; bytes] })
}

fn event(sequence: u64, body: Option<Progress>) -> Said {
    Said::SequenceEvent(SequenceEvent { sequence, body })
}

#[test]
fn a_member_that_breaks_the_protocol_is_lost_and_told_why() {
    let grants =
        |count, bytes| Said::LinkGrants(LinkGrants { incarnation: 1, descriptors: vec![vec![0; bytes]; count] });
    let enter = |name: &str, group| Said::BarrierEnter(BarrierEnter { name: name.to_owned(), group });
    let cases = [
        (offer(99, 1), "link 99 was never opened"),
        (offer(0, 1), "link 0 was never opened"),
        (offer(2, 1), "link 2 is between two other members"),
        (Said::LinkUp(LinkUp { incarnation: 2 }), "link 2 is between two other members"),
        (Said::LinkDown(LinkDown { incarnation: 2, reason: String::new() }), "between two other members"),
        (offer(1, 4097), "a descriptor of 4097 bytes"),
        (grants(65, 1), "65 regions granted"),
        (grants(1, 4097), "a descriptor of 4097 bytes"),
        (event(7, Some(Progress::Token(Token::default()))), "sequence 7 was never started"),
        (event(1, Some(Progress::Token(Token::default()))), "sequence 1 runs elsewhere"),
        (event(1, None), "nothing said about sequence 1"),
        (Said::Stats(MemberStats { request: 3, ..Default::default() }), "question 3, which was never asked"),
        (enter("x", 17), "barrier group 17 does not exist"),
        (enter("x", 2), "a barrier of the other side"),
        (enter(&"x".repeat(300), 1), "at most 256 bytes"),
    ];
    for (said, words) in cases {
        let (mut world, attention, ffn) = World::complete(2, 1);
        world
            .state
            .generate(GenerateRequest { prompt: vec![1], attention_rank: Some(1), ..Default::default() })
            .unwrap();
        world.say(attention[0], said);
        let refusal = world.refusal(attention[0]);
        assert!(refusal.contains("broke the protocol") && refusal.contains(words), "{refusal}");
        assert!(matches!(world.inbox(ffn[0]), [Body::PeerLost(_), ..]));
        assert!(world.progress.is_empty() && world.inbox(attention[1]).len() >= 2);
    }
}

#[test]
fn an_empty_message_is_a_breach() {
    let mut world = World::new(1, 1);
    let session = world.join(Role::Ffn);
    world.state.message(session, FromMember { body: None }, world.now);
    world.act();
    assert!(world.refusal(session).contains("says nothing"));
}

#[test]
fn nobody_floods_its_peers_with_offers_or_the_scheduler_with_barriers() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    (0..100).for_each(|_| world.say(attention[0], offer(1, 4096)));
    assert!(world.refusal(attention[0]).contains("more than 16 offers and grants"));
    let relayed = world.inbox(ffn[0]).iter().filter(|body| matches!(body, Body::LinkOffer(_))).count();
    assert_eq!(relayed, 16);
    for barrier in 0..100 {
        world.enter(ffn[0], &barrier.to_string(), Default::default());
    }
    assert!(world.refusal(ffn[0]).contains("more than 64 barriers"));
}

#[test]
fn a_long_reason_is_cut_before_it_is_passed_on() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    world.say(attention[0], Said::LinkDown(LinkDown { incarnation: 1, reason: "ü".repeat(100_000) }));
    let Body::CloseLink(close) = &world.inbox(ffn[0])[0] else { panic!() };
    assert_eq!(close.reason.len(), 1024);
}

#[derive(Clone, Debug)]
enum Step {
    Connect,
    Say(usize, Said),
    Disconnect(usize),
    Pass(u64),
    Generate(Option<u32>),
    Cancel(u64),
    Stats,
    LinksUp,
}

fn saying() -> impl Strategy<Value = Said> {
    let hello = (0..4_i32, prop::option::of(0..4_u32), prop::bool::weighted(0.9)).prop_map(|(role, rank, fits)| {
        let workload = if fits { "tiny bf16" } else { "big" }.to_owned();
        Said::Hello(Hello { role, rank, workload, ..hello(Role::Ffn) })
    });
    prop_oneof![
        6 => hello,
        2 => Just(Said::Heartbeat(Default::default())),
        1 => Just(Said::Leave(Default::default())),
        4 => (0..12_u32, 0..2_usize).prop_map(|(incarnation, size)| offer(incarnation, size * 5000)),
        4 => (0..12_u32).prop_map(|incarnation| Said::LinkUp(LinkUp { incarnation })),
        4 => (0..12_u32).prop_map(|incarnation| Said::LinkDown(LinkDown { incarnation, reason: String::new() })),
        4 => (0..3_u8, 0..4_i32).prop_map(|(name, group)| {
            Said::BarrierEnter(BarrierEnter { name: name.to_string(), group })
        }),
        3 => (0..6_u64, prop::bool::ANY).prop_map(|(sequence, last)| {
            let token = Progress::Token(Token::default());
            event(sequence, Some(if last { Progress::Finished(Default::default()) } else { token }))
        }),
        2 => (0..4_u64).prop_map(|request| Said::Stats(MemberStats { request, ..Default::default() })),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Connect),
        20 => (0..12_usize, saying()).prop_map(|(session, said)| Step::Say(session, said)),
        1 => (0..12_usize).prop_map(Step::Disconnect),
        3 => (0..2000_u64).prop_map(Step::Pass),
        2 => prop::option::of(0..3_u32).prop_map(Step::Generate),
        1 => (1..6_u64).prop_map(Step::Cancel),
        1 => Just(Step::Stats),
        2 => Just(Step::LinksUp),
    ]
}

/// What must hold whatever members say.
fn check(world: &World, seen: &mut BTreeMap<u32, [Session; 2]>) {
    let status = world.state.status();
    let mut ranks = BTreeSet::new();
    for member in &status.members {
        let peer = member.peer.as_ref().unwrap();
        assert!(ranks.insert((peer.role, peer.rank)), "two members hold one rank: {status:?}");
        assert!(peer.rank < 2);
    }
    for (incarnation, pair) in world.state.live_links() {
        assert_eq!(*seen.entry(incarnation).or_insert(pair), pair, "incarnation {incarnation} was used again");
        for end in pair {
            let is_member = |peer: &stepmesh_proto::control::Peer| peer.member == end.number();
            assert!(status.members.iter().any(|member| member.peer.as_ref().is_some_and(is_member)));
        }
    }
    let links: u32 = status.members.iter().map(|member| member.links_up).sum();
    assert_eq!(status.complete, links == 2 * 4 && status.members.len() == 4, "{status:?}");
    for (session, inbox) in &world.inboxes {
        let mut epoch = 0;
        for body in inbox {
            if let Body::Epoch(told) = body {
                assert!(told.epoch >= epoch, "{session:?} was told of an older epoch");
                epoch = told.epoch;
            }
        }
        let opened: Vec<_> = world.opened(*session).iter().map(|open| open.incarnation).collect();
        assert!(opened.windows(2).all(|pair| pair[0] < pair[1]), "{session:?}: {opened:?}");
    }
    let finals = world.progress.iter().filter(|(_, event)| !matches!(event, Progress::Token(_)));
    let mut ended = BTreeSet::new();
    finals.for_each(|(sequence, _)| assert!(ended.insert(*sequence), "{sequence:?} ended twice"));
}

proptest! {
    #[test]
    fn no_words_in_any_order_break_the_state(steps in vec(step(), 1..150)) {
        let mut world = World::new(2, 2);
        let mut sessions = Vec::new();
        let mut seen = BTreeMap::new();
        for step in steps {
            match step {
                Step::Connect => sessions.push(world.connect()),
                Step::Say(at, said) => if let Some(session) = sessions.get(at) { world.say(*session, said) },
                Step::Disconnect(at) => if let Some(session) = sessions.get(at) { world.disconnect(*session) },
                Step::Pass(ms) => {
                    world.now += Duration::from_millis(ms);
                    world.state.tick(world.now);
                }
                Step::Generate(attention_rank) => {
                    let request = GenerateRequest { prompt: vec![1], attention_rank, ..Default::default() };
                    let refused = world.state.generate(request).is_err();
                    prop_assert!(world.state.status().complete || refused);
                }
                Step::Cancel(sequence) => world.state.cancel(SequenceId(sequence)),
                Step::Stats => drop(world.state.stats(true, world.now)),
                Step::LinksUp => world.all_links_up(),
            }
            world.act();
            check(&world, &mut seen);
        }
    }
}
