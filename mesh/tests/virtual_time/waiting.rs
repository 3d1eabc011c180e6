//! Deadlines and cancelled tickets: the slot is quarantined, the link fenced, and nothing late is ever seen.

use crate::world::{Sent, Shape, World, check};
use std::time::Duration;
use stepmesh_mesh::{MeshError, MeshEvent, Role, TicketFailure, TicketStatus};

fn failure(world: &mut World, sent: &Sent) -> TicketFailure {
    match world.attention(sent.rank).take(sent.ticket) {
        Err(MeshError::Ticket(failure)) => failure,
        other => panic!("{:?}", other.map(|_| ())),
    }
}

fn links_up(world: &mut World, rank: u32) -> usize {
    let events = world.events(Role::Attention, rank);
    events.iter().filter(|event| matches!(event, MeshEvent::LinkUp(_))).count()
}

#[test]
fn an_expired_wait_leaves_the_ticket_outstanding() {
    let mut world = World::new(Shape::new(1, 1));
    world.ffn(0).serves = false;
    let sent = world.send(0, 0, 0, 4).unwrap();
    for _ in 0..3 {
        let expired = world.attention(0).wait(sent.ticket, Duration::ZERO).map(|_| ());
        assert!(matches!(expired, Err(MeshError::Timeout(_))));
        world.run_for(Duration::from_millis(1));
    }
    world.ffn(0).serves = true;
    world.run_until("answered", |world| !world.is_pending(&sent));
    check(&sent, &world.attention(0).wait(sent.ticket, Duration::ZERO).unwrap());
}

#[test]
fn a_cancelled_slot_comes_back_on_a_new_incarnation() {
    for maps in [false, true] {
        let mut world = World::new(Shape { maps, ..Shape::new(1, 2) });
        world.ffn(1).serves = false;
        let sent = world.send(0, 0, 0, 4).unwrap();
        world.run_for(Duration::from_millis(1));
        world.clear_events();
        world.attention(0).cancel(sent.ticket);
        assert_eq!(world.attention(0).status(sent.ticket), TicketStatus::Failed(TicketFailure::Cancelled));
        assert!(world.attention(0).acquire(0).is_err(), "quarantined");
        world.ffn(1).serves = true;
        world.run_until("free again", |world| world.attention(0).acquire(0).is_ok());
        assert_eq!(links_up(&mut world, 0), 1, "only the link of the instance that had not replied was fenced");
        world.exercise(1);
        let status = world.attention(0).status(sent.ticket);
        assert_eq!(status, TicketStatus::Unknown, "it need not have been waited for");
    }
}

#[test]
fn a_cancelled_ticket_may_be_waited_for() {
    let mut world = World::new(Shape::new(1, 1));
    let sent = world.send(0, 0, 0, 4).unwrap();
    world.attention(0).cancel(sent.ticket);
    world.attention(0).cancel(sent.ticket);
    assert_eq!(failure(&mut world, &sent), TicketFailure::Cancelled);
    assert!(matches!(world.attention(0).take(sent.ticket).map(|_| ()), Err(MeshError::UnknownTicket(_))));
}

#[test]
fn other_transfers_on_the_link_finish_before_the_fence() {
    let mut world = World::new(Shape::new(1, 1));
    world.ffn(0).serves = false;
    let kept = world.send(0, 0, 0, 4).unwrap();
    let given_up = world.send(0, 1, 0, 4).unwrap();
    world.run_for(Duration::from_millis(1));
    world.clear_events();
    world.attention(0).cancel(given_up.ticket);
    let refused = world.attention(0).acquire(2).map(|_| ());
    assert!(matches!(refused, Err(MeshError::NotLinked(_))), "nothing new while it drains");
    let batch = world.ffn(0).take().unwrap();
    assert_eq!(batch.microbatch, 0);
    world.ffn(0).respond(batch);
    world.finish(&kept);
    world.ffn(0).serves = true;
    world.run_until("linked again", World::is_complete);
    assert_eq!(links_up(&mut world, 0), 1);
    world.exercise(1);
}

#[test]
fn a_drain_that_lasts_too_long_is_cut_off() {
    let mut world = World::new(Shape { drain: Duration::from_millis(20), ..Shape::new(1, 1) });
    world.ffn(0).serves = false;
    let other = world.send(0, 0, 0, 4).unwrap();
    let given_up = world.send(0, 1, 0, 4).unwrap();
    world.run_for(Duration::from_millis(1));
    let began = world.clock.now();
    world.attention(0).cancel(given_up.ticket);
    world.run_until("cut off", |world| !world.is_pending(&other));
    let took = world.clock.now() - began;
    assert!(took >= Duration::from_millis(20) && took < Duration::from_millis(25), "{took:?}");
    let failure = failure(&mut world, &other);
    assert!(matches!(&failure, TicketFailure::PeerLost { peer, .. } if peer.rank == 0), "{failure}");
    world.ffn(0).serves = true;
    world.run_until("linked again", World::is_complete);
    world.exercise(1);
}

#[test]
fn a_reply_that_comes_after_the_cancel_never_shows_in_the_slot() {
    for maps in [false, true] {
        let mut world = World::new(Shape { maps, ..Shape::new(1, 1) });
        world.ffn(0).serves = false;
        let given_up = world.send(0, 0, 0, 16).unwrap();
        world.run_until("there", |world| world.ffn(0).mesh.poll().is_ok() && world.clock.now_ns() > 5_000_000);
        let late = world.ffn(0).take().unwrap();
        world.attention(0).cancel(given_up.ticket);
        world.run_for(Duration::from_millis(10));
        let refused = world.attention(0).acquire(0).map(|_| ());
        assert!(matches!(refused, Err(MeshError::NotLinked(_))), "the FFN instance still uses the slot");
        world.ffn(0).respond(late);
        world.ffn(0).serves = true;
        world.run_until("linked again", World::is_complete);
        world.exercise(1);
    }
}

#[test]
fn stripes_that_come_after_the_slots_reuse_never_show_in_it() {
    for (from, to) in [(Role::Attention, Role::Ffn), (Role::Ffn, Role::Attention)] {
        for lane in 0..4 {
            let mut world = World::new(Shape { lanes: 4, seed: u64::from(lane), ..Shape::new(1, 1) });
            world.exercise(0);
            let (from, to) = (world.device(from, 0), world.device(to, 0));
            world.fabric.hold_lane(&from, &to, lane, Duration::from_millis(30));
            let given_up = world.send(0, 0, 1, 16).unwrap();
            world.run_for(Duration::from_millis(2));
            assert!(world.is_pending(&given_up), "a stripe is missing");
            world.attention(0).cancel(given_up.ticket);
            world.run_until("linked again", World::is_complete);
            let reused = world.send(0, 0, 2, 16).unwrap();
            world.finish(&reused);
            world.run_for(Duration::from_millis(50));
            world.exercise(3);
            assert_eq!(world.ffn(0).answered.iter().filter(|(_, group, _)| *group == 2).count(), 1);
        }
    }
}
