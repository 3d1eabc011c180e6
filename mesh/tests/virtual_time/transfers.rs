//! What one transfer can carry, and when the next may start.

use crate::world::{Shape, World, check};
use std::time::Duration;
use stepmesh_mesh::{MeshError, PartSpec, Request, TicketFailure, TicketStatus};
use stepmesh_proto::{Dtype, Part};

fn spec(max_rows: u32, row_bytes: u32) -> PartSpec {
    PartSpec { row_bytes, max_rows }
}

#[test]
fn zero_rows_and_zero_parts_travel() {
    for maps in [false, true] {
        let mut world = World::new(Shape { maps, parts: vec![spec(4, 64); 2], ..Shape::new(1, 2) });
        for rows in [&[0, 0][..], &[], &[0, 3], &[0]] {
            for leave in [false, true] {
                let sent = world.send_as(0, 0, Request { group: 3, leave, ..Request::default() }, rows).unwrap();
                world.finish(&sent);
            }
        }
        let answered = &world.ffn(1).answered;
        assert_eq!(answered.len(), 8, "the application saw each of them, the last requests without parts too");
    }
}

#[test]
fn eight_parts_keep_their_keys_types_and_bytes() {
    let specs: Vec<_> = (1..=8).map(|part| spec(4, 16 * part)).collect();
    let mut world = World::new(Shape { parts: specs.clone(), lanes: 3, ..Shape::new(1, 1) });
    let mesh = world.attention(0);
    let mut buffer = mesh.acquire(2).unwrap();
    let mut parts = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        let rows = index as u32 % 5;
        let part = Part {
            key: u64::MAX - index as u64,
            dtype: if index % 2 == 0 { Dtype::Fp8E4M3 } else { Dtype::Bf16 },
            rows,
            row_bytes: spec.row_bytes,
            ..Part::default()
        };
        buffer.part_mut(index)[..part.bytes() as usize].fill(index as u8 + 10);
        parts.push(part);
    }
    let request = Request { group: 60, app: *b"sixteen bytes...", parts: &parts, leave: false };
    let ticket = mesh.push_pull(buffer, request).unwrap();
    world.run_until("answered", |world| world.attention(0).status(ticket) != TicketStatus::Pending);
    let reply = world.attention(0).take(ticket).unwrap();
    assert_eq!(reply.app(0), *b"sixteen bytes...");
    for (index, part) in parts.iter().enumerate() {
        let replied = reply.parts(0)[index];
        assert_eq!((replied.key, replied.dtype, replied.rows), (part.key, part.dtype, part.rows));
        assert_eq!(reply.part(0, index), vec![index as u8 + 11; part.bytes() as usize]);
    }
    let trace = reply.trace(0);
    assert!(trace.same_clock && trace.a2f_ns > 0 && trace.f2a_ns > 0);
    assert_eq!(trace.a2f_ns + trace.queue_ns + trace.process_ns + trace.f2a_ns, trace.round_trip_ns);
}

#[test]
fn rows_vary_from_call_to_call_and_only_those_in_use_are_seen() {
    for maps in [false, true] {
        let mut world = World::new(Shape { maps, ..Shape::new(2, 2) });
        for rows in [16, 1, 0, 7, 16, 3] {
            let sent = [world.send(0, 0, 1, rows).unwrap(), world.send(1, 0, 1, 16 - rows).unwrap()];
            sent.iter().for_each(|sent| world.finish(sent));
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_key_and_the_slot_stays_usable() {
    let mut world = World::new(Shape::new(1, 1));
    let mesh = world.attention(0);
    let part = |rows, row_bytes| Part { key: 77, rows, row_bytes, ..Part::default() };
    for parts in [vec![part(17, 64)], vec![part(1, 1025)], vec![part(1, 64); 2], vec![part(0, 0); 9]] {
        let buffer = mesh.acquire(0).unwrap();
        let error = mesh.push_pull(buffer, Request { parts: &parts, ..Request::default() }).unwrap_err();
        assert!(matches!(&error, MeshError::Transfer(_)), "{error}");
        assert!(parts.len() > 1 || error.to_string().contains("key 77"), "{error}");
    }
    let buffer = mesh.acquire(0).unwrap();
    let reserved = mesh.push_pull(buffer, Request { group: u32::MAX, ..Request::default() });
    assert!(matches!(reserved, Err(MeshError::Transfer(_))));
    assert!(matches!(mesh.acquire(3), Err(MeshError::NoMicrobatch { slot: 3, microbatches: 3 })));
    assert!(matches!(mesh.leave(3), Err(MeshError::NoMicrobatch { .. })));
    world.exercise(1);
}

#[test]
fn several_microbatches_are_in_flight_and_finish_in_any_order() {
    let mut world = World::new(Shape { microbatches: 8, ..Shape::new(2, 2) });
    (0..2).for_each(|rank| world.ffn(rank).serves = false);
    let sent: Vec<_> = (0..2)
        .flat_map(|rank| (0..8).map(move |slot| (rank, slot)))
        .map(|(rank, slot)| world.send(rank, slot, 0, 9).unwrap())
        .collect();
    world.run_for(Duration::from_millis(5));
    for rank in 0..2 {
        let mut batches: Vec<_> = std::iter::from_fn(|| world.ffn(rank).take()).collect();
        assert!(batches.len() >= 8, "every microbatch is a batch of its own");
        batches.reverse();
        batches.into_iter().for_each(|batch| world.ffn(rank).respond(batch));
    }
    (0..2).for_each(|rank| world.ffn(rank).serves = true);
    sent.iter().for_each(|sent| world.finish(sent));
}

#[test]
fn a_slot_in_use_would_block() {
    let mut world = World::new(Shape::new(1, 1));
    let buffer = world.attention(0).acquire(0).unwrap();
    let blocked = |world: &mut World| {
        let mesh = world.attention(0);
        matches!(mesh.acquire(0), Err(MeshError::WouldBlock(0)))
            && matches!(mesh.leave(0), Err(MeshError::WouldBlock(0)))
    };
    assert!(blocked(&mut world), "while it is being filled");
    drop(buffer);
    let sent = world.send(0, 0, 0, 1).unwrap();
    assert!(blocked(&mut world), "while the request is under way");
    world.run_until("answered", |world| !world.is_pending(&sent));
    assert!(blocked(&mut world), "while the reply was not taken");
    assert!(world.attention(0).acquire(1).is_ok(), "other slots are free");
    check(&sent, &world.attention(0).take(sent.ticket).unwrap());
    assert!(world.attention(0).acquire(0).is_ok());
    let again = world.attention(0).take(sent.ticket).map(|_| ());
    assert!(matches!(again, Err(MeshError::UnknownTicket(_))));
}

#[test]
fn payloads_are_striped_over_one_to_eight_lanes() {
    for lanes in 1..=8 {
        let lane_skew = Duration::ZERO..Duration::from_micros(100);
        let parts = vec![spec(16, 100), spec(16, 3), spec(2, 4000)];
        let mut world = World::new(Shape { lanes, lane_skew, parts, ..Shape::new(2, 2) });
        for rows in [[16, 16, 2], [1, 0, 0], [0, 1, 1], [0, 0, 0], [3, 16, 1]] {
            let sent = [0, 1].map(|rank| world.send_as(rank, 1, Request::default(), &rows).unwrap());
            sent.iter().for_each(|sent| world.finish(sent));
        }
    }
}

#[test]
fn full_lanes_delay_transfers_and_lose_nothing() {
    let parts = vec![spec(4, 64); 8];
    let mut world = World::new(Shape { microbatches: 16, queue_depth: 10, parts, ..Shape::new(2, 2) });
    for group in 0..5 {
        world.exercise(group);
    }
}

#[test]
fn a_failed_segment_fails_its_ticket_only_and_says_why() {
    let mut world = World::new(Shape::new(2, 2));
    world.ffn(1).answer = |segment, ffn| {
        if segment.rank() == 0 { segment.fail("no such expert µµ") } else { crate::world::add_rank(segment, ffn) }
    };
    let sent = [world.send(0, 0, 0, 2).unwrap(), world.send(1, 0, 0, 2).unwrap()];
    world.finish(&sent[1]);
    world.run_until("failed", |world| !world.is_pending(&sent[0]));
    let failure = world.attention(0).take(sent[0].ticket).map(|_| ());
    let Err(MeshError::Ticket(TicketFailure::PeerFailed { peer, reason })) = failure else { panic!("{failure:?}") };
    assert_eq!((peer.rank, reason.as_str()), (1, "no such expert "), "cut between characters");
    world.run_until("free", |world| world.attention(0).acquire(0).is_ok());
}
