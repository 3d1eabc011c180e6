//! Peers that break the protocol: their link ends with a reason that says how, and nobody else notices.

use crate::rogue::Rogue;
use crate::world::{Shape, World};
use std::time::Duration;
use stepmesh_mesh::{MeshEvent, Role, TicketFailure, TicketStatus};
use stepmesh_proto::{Flags, HEADER_MAX_BYTES, Header, Immediate, Part};

/// One attention instance, an honest FFN instance, and a rogue for the second.
fn world_with_ffn() -> World {
    let mut world = World::deserted(Shape { lanes: 1, ..Shape::new(1, 2) });
    world.start(Role::Attention, 0);
    world.start(Role::Ffn, 0);
    world.start_rogue(Role::Ffn, 1);
    world.run_until("complete", World::is_complete);
    world.run_until("up", |world| world.rogue(Role::Ffn, 1).is_up());
    world.clear_events();
    world
}

/// An honest attention instance, a rogue for the first, and one FFN instance.
fn world_with_attention() -> World {
    let mut world = World::deserted(Shape { lanes: 1, ..Shape::new(2, 1) });
    world.start_rogue(Role::Attention, 0);
    world.start(Role::Attention, 1);
    world.start(Role::Ffn, 0);
    world.run_until("complete", World::is_complete);
    world.run_until("up", |world| world.rogue(Role::Attention, 0).is_up());
    world.clear_events();
    world
}

/// Why the link to the rogue ended, as its peer says.
fn reason(world: &mut World, victim: (Role, u32), rogue: (Role, u32)) -> String {
    let mut reason = None;
    world.run_until("noticed", |world| {
        for event in world.events(victim.0, victim.1) {
            if let MeshEvent::LinkDown { peer, reason: why } = event {
                assert_eq!((peer.role, peer.rank), rogue, "only the rogue's link ends");
                reason = Some(why);
            }
        }
        reason.is_some()
    });
    reason.unwrap()
}

/// What the attention instance says of a rogue FFN instance, which owes it a reply.
fn ffn_does(deed: impl Fn(&mut Rogue)) -> String {
    ffn_does_all(&[&deed])
}

fn ffn_does_all(deeds: &[&dyn Fn(&mut Rogue)]) -> String {
    let mut world = world_with_ffn();
    let sent = world.send(0, 0, 0, 4).unwrap();
    world.run_until("there", |world| !world.rogue(Role::Ffn, 1).immediates.is_empty());
    for deed in deeds {
        deed(world.rogue(Role::Ffn, 1));
        world.run_for(Duration::from_millis(1));
    }
    let reason = reason(&mut world, (Role::Attention, 0), (Role::Ffn, 1));
    world.run_until("over", |world| !world.is_pending(&sent));
    match world.attention(0).status(sent.ticket) {
        TicketStatus::Failed(TicketFailure::PeerLost { peer, .. }) => assert_eq!(peer.name, "rogue"),
        status => assert!(status == TicketStatus::Ready && deeds.len() > 1, "{status:?}"),
    }
    world.run_until("linked again", World::is_complete);
    reason
}

/// What the FFN instance says of a rogue attention instance; the other one's transfers go on before, while and after.
fn attention_does(deed: impl Fn(&mut Rogue)) -> String {
    attention_does_all(&[&deed])
}

fn attention_does_all(deeds: &[&dyn Fn(&mut Rogue)]) -> String {
    let mut world = world_with_attention();
    let survivor = world.send(1, 0, 0, 4).unwrap();
    world.run_for(Duration::from_millis(1));
    for deed in deeds {
        deed(world.rogue(Role::Attention, 0));
        world.run_for(Duration::from_millis(1));
    }
    let reason = reason(&mut world, (Role::Ffn, 0), (Role::Attention, 0));
    world.finish(&survivor);
    let again = world.send(1, 0, 1, 4).unwrap();
    world.finish(&again);
    let events = world.events(Role::Attention, 1);
    assert!(!events.iter().any(|event| matches!(event, MeshEvent::LinkDown { .. })), "{events:?}");
    world.run_until("linked again", World::is_complete);
    reason
}

fn assert_says(reason: &str, words: &str) {
    assert!(reason.contains(words), "`{reason}` does not say `{words}`");
}

#[test]
fn a_second_reply_ends_the_link() {
    let reply = |sequence| {
        move |rogue: &mut Rogue| {
            let header = rogue.header(0, sequence);
            rogue.transfer(&header);
        }
    };
    let reason = ffn_does_all(&[&reply(1), &reply(2)]);
    assert_says(&reason, "a reply for microbatch 0 that was not due");
}

#[test]
fn a_reply_to_nothing_ends_the_link() {
    let reason = ffn_does(|rogue| {
        let header = rogue.header(2, 1);
        rogue.transfer(&header);
    });
    assert_says(&reason, "a reply for microbatch 2 that was not due");
}

#[test]
fn a_header_that_contradicts_its_link_or_immediate_ends_the_link() {
    let forge = |change: fn(&mut Header)| {
        ffn_does(move |rogue| {
            let mut header = rogue.header(0, 1);
            change(&mut header);
            let mut bytes = [0; HEADER_MAX_BYTES];
            let length = header.encode(&mut bytes);
            let immediate = Immediate { slot: 0, lanes: 1, lane: 0, sequence: 1 };
            rogue.write(0, &bytes[..length], immediate.encode().unwrap());
        })
    };
    assert_says(&forge(|header| header.incarnation += 1), "the header of slot 0 says incarnation");
    assert_says(&forge(|header| header.source = 0), "source 0");
    assert_says(&forge(|header| header.slot = 1), "slot 1");
    assert_says(&forge(|header| header.sequence = 9), "sequence 9");
    assert_says(&forge(|header| header.flags = Flags::NONE), "the header of slot 0");
}

#[test]
fn an_immediate_that_cannot_be_next_ends_the_link() {
    let announce = |immediate: Immediate| ffn_does(move |rogue| rogue.announce(immediate.encode().unwrap()));
    let next = Immediate { slot: 0, lanes: 1, lane: 0, sequence: 1 };
    assert_says(&announce(Immediate { sequence: 2, ..next }), "is not the next of its slot");
    assert_says(&announce(Immediate { slot: 3, ..next }), "slot 3 of 3");
    assert_says(&announce(Immediate { slot: 1023, ..next }), "slot 1023 of 3");
    let twice = ffn_does(move |rogue| {
        let immediate = Immediate { lanes: 2, ..next }.encode().unwrap();
        rogue.announce(immediate);
        rogue.announce(immediate);
    });
    assert_says(&twice, "is not the next of its slot");
}

#[test]
fn a_part_out_of_its_place_ends_the_link() {
    let place = |part: Part, count: usize| {
        ffn_does(move |rogue| {
            let mut header = rogue.header(0, 1);
            header.set_parts(&vec![part; count]).unwrap();
            rogue.transfer(&header);
        })
    };
    let part = Part { key: 5, rows: 16, row_bytes: 64, ..Part::default() };
    assert_says(&place(Part { offset: 64, ..part }, 1), "part 0 (key 5)");
    assert_says(&place(Part { rows: 17, ..part }, 1), "does not fit its place");
    assert_says(&place(Part { rows: u32::MAX, row_bytes: u32::MAX, ..part }, 1), "does not fit its place");
    assert_says(&place(part, 2), "the layout has 1 parts");
}

#[test]
fn a_garbage_header_ends_the_link() {
    let garbage = |bytes: Vec<u8>| {
        ffn_does(move |rogue| {
            let immediate = Immediate { slot: 0, lanes: 1, lane: 0, sequence: 1 };
            rogue.write(0, &bytes, immediate.encode().unwrap());
        })
    };
    assert_says(&garbage(vec![0xff; HEADER_MAX_BYTES]), "not a stepmesh header");
    let mut torn = [0; HEADER_MAX_BYTES];
    Header::default().encode(&mut torn);
    torn[30] ^= 1;
    assert_says(&garbage(torn.to_vec()), "torn or corrupt");
    torn[2] = 99;
    assert_says(&garbage(torn.to_vec()), "wire version 99");
}

#[test]
fn a_write_outside_what_was_granted_ends_the_link() {
    assert_says(&ffn_does(Rogue::write_outside), "access refused");
}

#[test]
fn a_request_before_the_reply_to_the_last_one_ends_the_link() {
    // Beyond what the other instance has reached, and so held back.
    let request = |sequence| {
        move |rogue: &mut Rogue| {
            let mut header = rogue.header(0, sequence);
            header.group = 1000;
            rogue.transfer(&header);
        }
    };
    let reason = attention_does_all(&[&request(1), &request(2)]);
    assert_says(&reason, "a request for microbatch 0 before the reply to its last one");
}

#[test]
fn an_attention_instance_cannot_forge_either() {
    let forge = |change: fn(&mut Header)| {
        attention_does(move |rogue| {
            let mut header = rogue.header(1, 1);
            change(&mut header);
            rogue.transfer(&header);
        })
    };
    assert_says(&forge(|header| header.source = 1), "source 1");
    assert_says(&forge(|header| header.incarnation = 0), "incarnation 0");
    assert_says(&forge(|header| header.flags = Flags::REPLY), "the header of slot 1");
    let far = Part { rows: 1, row_bytes: 1, offset: u32::MAX, ..Part::default() };
    let reason = attention_does(move |rogue| {
        let mut header = rogue.header(0, 1);
        header.set_parts(&[far]).unwrap();
        rogue.transfer(&header);
    });
    assert_says(&reason, "does not fit its place");
}

#[test]
fn transfers_before_the_link_is_up_are_bounded() {
    let mut world = World::deserted(Shape { lanes: 1, ..Shape::new(1, 1) });
    world.start(Role::Ffn, 0);
    world.start_rogue(Role::Attention, 0);
    world.rogue(Role::Attention, 0).withholds_grants = true;
    world.run_until("up on one side", |world| world.rogue(Role::Attention, 0).is_up());
    world.clear_events();
    for sequence in 0..10 {
        let header = world.rogue(Role::Attention, 0).header(0, sequence);
        world.rogue(Role::Attention, 0).transfer(&header);
    }
    let reason = reason(&mut world, (Role::Ffn, 0), (Role::Attention, 0));
    assert_says(&reason, "more transfers than slots");
}

#[test]
fn random_words_and_bytes_never_disturb_anybody_else() {
    use rand::Rng;
    let mut world = world_with_ffn();
    for _ in 0..300 {
        if !world.rogue(Role::Ffn, 1).is_up() {
            world.run_for(Duration::from_millis(1));
            continue;
        }
        let mut bytes = [0_u8; 128];
        world.random.fill(&mut bytes);
        let mut immediate: u32 = world.random.random();
        if world.random.random_bool(0.5) {
            // Such as pass for the next transfer's.
            immediate = Immediate { slot: 0, lanes: 1, lane: 0, sequence: 1 }.encode().unwrap();
        }
        if world.random.random_bool(0.3) {
            let mut header = world.rogue(Role::Ffn, 1).header(0, 1);
            header.incarnation = world.random.random_range(0..20);
            let mut encoded = [0; HEADER_MAX_BYTES];
            header.encode(&mut encoded);
            bytes.copy_from_slice(&encoded[..128]);
        }
        world.rogue(Role::Ffn, 1).write(0, &bytes, immediate);
        world.run_for(Duration::from_millis(1));
    }
    for event in world.events(Role::Attention, 0) {
        if let MeshEvent::LinkDown { peer, .. } = event {
            assert_eq!(peer.rank, 1, "only the rogue's links end");
        }
    }
}
