//! Many transfers over large deployments, and deployments in which everything that can go wrong does.

use crate::world::{Sent, Shape, World};
use rand::Rng;
use std::time::Duration;
use stepmesh_mesh::{MeshError, PartSpec, Role, TicketFailure};

/// Keeps every slot busy until so many transfers are done; each byte of each reply is checked.
fn soak(shape: Shape, transfers: usize) {
    let mut world = World::new(shape);
    let slots = world.shape.attention as usize * usize::from(world.shape.microbatches);
    let mut under_way: Vec<Option<Sent>> = vec![None; slots];
    let mut layers = vec![0; slots];
    let mut done = 0;
    while done < transfers {
        for slot in 0..slots {
            let microbatches = usize::from(world.shape.microbatches);
            let (rank, microbatch) = ((slot / microbatches) as u32, (slot % microbatches) as u16);
            if let Some(sent) = under_way[slot].take_if(|sent| !world.is_pending(sent)) {
                world.finish(&sent);
                done += 1;
            }
            if under_way[slot].is_none() {
                let rows: Vec<u32> = (0..world.shape.parts.len()).map(|_| world.random.random_range(0..=4)).collect();
                let request = stepmesh_mesh::Request { group: layers[slot], ..Default::default() };
                under_way[slot] = Some(world.send_as(rank, microbatch, request, &rows).unwrap());
                layers[slot] = (layers[slot] + 1) % 60;
            }
        }
        world.turn();
    }
}

fn two_parts(attention: u32, ffn: u32) -> Shape {
    let parts = vec![PartSpec { row_bytes: 48, max_rows: 4 }, PartSpec { row_bytes: 7, max_rows: 4 }];
    Shape { parts, grain: Duration::from_micros(20), ..Shape::new(attention, ffn) }
}

#[test]
fn a_hundred_thousand_random_transfers_arrive_byte_for_byte() {
    soak(Shape { microbatches: 8, stripe_bytes: 100, ..two_parts(2, 2) }, 70_000);
    soak(Shape { microbatches: 8, maps: true, ..two_parts(3, 1) }, 30_000);
}

#[test]
fn sixteen_attention_and_sixteen_ffn_instances_work() {
    soak(Shape { grain: Duration::from_micros(50), ..two_parts(16, 16) }, 1_500);
}

/// A deployment under random cancels, broken links, held lanes and deaths: a reply is right or the ticket fails with a
/// typed error, and when it is over everything works again.
fn storm(seed: u64) {
    let mut world = World::new(Shape {
        seed,
        maps: seed.is_multiple_of(2),
        lanes: 1 + (seed % 4) as u8,
        drain: Duration::from_millis(2),
        ..two_parts(1 + (seed % 3) as u32, 1 + (seed / 3 % 3) as u32)
    });
    let (attention, ffn) = (world.shape.attention, world.shape.ffn);
    let mut under_way: Vec<Sent> = Vec::new();
    let end = world.clock.now() + Duration::from_millis(400);
    let mut answered = 0;
    while world.clock.now() < end {
        world.turn();
        let (rank, microbatch) = (world.random.random_range(0..attention), world.random.random_range(0..3));
        match world.random.random_range(0..2000) {
            0..10 => {
                if let Some(sent) = under_way.iter().find(|sent| sent.rank == rank).cloned() {
                    world.attention(rank).cancel(sent.ticket);
                }
            }
            10..13 => {
                let other = world.random.random_range(0..ffn);
                let ends = (world.device(Role::Attention, rank), world.device(Role::Ffn, other));
                world.fabric.break_links(&ends.0, &ends.1);
            }
            13..20 => {
                let other = world.random.random_range(0..ffn);
                let mut ends = [world.device(Role::Attention, rank), world.device(Role::Ffn, other)];
                let turn = world.random.random_range(0..2);
                ends.rotate_left(turn);
                let lane = world.random.random_range(0..world.shape.lanes);
                let time = Duration::from_micros(world.random.random_range(0..20_000));
                world.fabric.hold_lane(&ends[0], &ends[1], lane, time);
            }
            20 => {
                let other = world.random.random_range(0..ffn);
                world.kill(Role::Ffn, other);
                world.start(Role::Ffn, other);
            }
            21 => {
                world.kill(Role::Attention, rank);
                world.start(Role::Attention, rank);
                under_way.retain(|sent| sent.rank != rank);
            }
            22..25 => {
                let other = world.random.random_range(0..ffn);
                let serves = world.random.random();
                world.ffn(other).serves = serves;
            }
            _ => {}
        }
        let rows = [world.random.random_range(0..=4), world.random.random_range(0..=4)];
        let request = stepmesh_mesh::Request { group: world.random.random_range(0..5), ..Default::default() };
        // A rank that does not go on must leave, or others would wait for it for ever.
        match world.send_as(rank, microbatch, stepmesh_mesh::Request { leave: true, ..request }, &rows) {
            Ok(sent) => under_way.push(sent),
            Err(MeshError::WouldBlock(_) | MeshError::NotLinked(_)) => {}
            Err(error) => panic!("seed {seed}: {error}"),
        }
        answered += settle(&mut world, &mut under_way);
    }
    (0..ffn).for_each(|rank| world.ffn(rank).serves = true);
    world.run_until("settled", |world| {
        answered += settle(world, &mut under_way);
        under_way.is_empty() && world.is_complete()
    });
    world.run_for(Duration::from_millis(50));
    world.run_until("complete", World::is_complete);
    world.exercise(1);
    assert!(answered > 0, "seed {seed}");
}

/// Takes what is over; returns how many were answered.
fn settle(world: &mut World, under_way: &mut Vec<Sent>) -> usize {
    let mut answered = 0;
    let mut index = 0;
    while index < under_way.len() {
        let sent = under_way[index].clone();
        if world.is_pending(&sent) {
            index += 1;
            continue;
        }
        under_way.swap_remove(index);
        match world.attention(sent.rank).take(sent.ticket) {
            Ok(reply) => {
                crate::world::check(&sent, &reply);
                answered += 1;
            }
            Err(MeshError::Ticket(TicketFailure::PeerLost { .. } | TicketFailure::Cancelled)) => {}
            // Cancelled, and its slot taken by the next one already.
            Err(MeshError::UnknownTicket(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    answered
}

#[test]
fn whatever_goes_wrong_a_reply_is_right_or_the_ticket_fails() {
    for seed in 0..60 {
        storm(seed);
    }
}
