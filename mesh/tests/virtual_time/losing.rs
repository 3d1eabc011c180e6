//! Peers, links and schedulers that are lost: tickets fail by name, survivors go on, replacements take the rank.

use crate::world::{Shape, World};
use std::time::Duration;
use stepmesh_mesh::{MeshError, MeshEvent, Role, TicketFailure};

#[test]
fn a_lost_ffn_instance_fails_the_tickets_that_wait_for_it_by_name() {
    for maps in [false, true] {
        let mut world = World::new(Shape { maps, ..Shape::new(2, 2) });
        world.ffn(1).serves = false;
        let sent = [world.send(0, 0, 0, 4).unwrap(), world.send(1, 2, 0, 4).unwrap()];
        world.run_for(Duration::from_millis(1));
        world.kill(Role::Ffn, 1);
        for sent in &sent {
            world.run_until("failed", |world| !world.is_pending(sent));
            let failed = world.attention(sent.rank).take(sent.ticket).map(|_| ());
            let Err(MeshError::Ticket(TicketFailure::PeerLost { peer, .. })) = failed else { panic!("{failed:?}") };
            assert_eq!((peer.role, peer.rank), (Role::Ffn, 1));
        }
        world.run_for(Duration::from_millis(100));
        let refused = world.attention(0).acquire(0).unwrap_err();
        assert_eq!(refused.to_string(), "not linked with ffn 1");
        let events = world.events(Role::Attention, 1);
        assert!(events.iter().any(|event| matches!(event, MeshEvent::PeerLost { peer, .. } if peer.rank == 1)));

        world.start(Role::Ffn, 1);
        world.run_until("complete again", World::is_complete);
        world.exercise(1);
    }
}

#[test]
fn a_lost_attention_instance_leaves_the_others_transfers_alone() {
    for maps in [false, true] {
        let mut world = World::new(Shape { maps, ..Shape::new(3, 2) });
        (0..2).for_each(|rank| world.ffn(rank).serves = false);
        let sent: Vec<_> = (0..3).map(|rank| world.send(rank, 0, 0, 4).unwrap()).collect();
        world.run_for(Duration::from_millis(1));
        let held: Vec<_> = (0..2).map(|rank| world.ffn(rank).take().unwrap()).collect();
        world.clear_events();
        world.kill(Role::Attention, 1);
        world.run_for(Duration::from_millis(100));
        (0..2).for_each(|rank| world.ffn(rank).serves = true);
        for (rank, batch) in (0..).zip(held) {
            world.ffn(rank).respond(batch);
        }
        world.finish(&sent[0]);
        world.finish(&sent[2]);
        let next = [0, 2].map(|rank| world.send(rank, 0, 1, 4).unwrap());
        next.iter().for_each(|sent| world.finish(sent));
        for rank in [0, 2] {
            let events = world.events(Role::Attention, rank);
            assert!(!events.iter().any(|event| matches!(event, MeshEvent::LinkDown { .. })), "{events:?}");
        }
        world.start(Role::Attention, 1);
        world.run_until("complete again", World::is_complete);
        world.exercise(2);
    }
}

#[test]
fn a_replacement_joins_while_an_old_batch_is_still_held() {
    for maps in [false, true] {
        let mut world = World::new(Shape { maps, ..Shape::new(2, 1) });
        world.ffn(0).serves = false;
        world.send(0, 0, 0, 4).unwrap();
        let kept = world.send(1, 0, 0, 4).unwrap();
        world.run_for(Duration::from_millis(1));
        let held = world.ffn(0).take().unwrap();
        world.kill(Role::Attention, 0);
        world.start(Role::Attention, 0);
        world.run_for(Duration::from_secs(1));
        assert!(!world.is_complete(), "its place is still in use");
        // With mapping only the FFN instance has to wait for the place: what is sent to it meanwhile waits too.
        let early = maps.then(|| world.send(0, 0, 0, 4).unwrap());
        world.run_for(Duration::from_millis(10));
        world.ffn(0).respond(held);
        world.ffn(0).serves = true;
        world.finish(&kept);
        early.iter().for_each(|sent| world.finish(sent));
        world.run_until("complete again", World::is_complete);
        world.exercise(1);
    }
}

#[test]
fn a_broken_link_comes_back_by_itself() {
    let mut world = World::new(Shape::new(2, 2));
    for round in 0..3 {
        let sent: Vec<_> = (0..2).map(|rank| world.send(rank, 0, round, 4).unwrap()).collect();
        let devices = (world.device(Role::Attention, 0), world.device(Role::Ffn, 1));
        world.clear_events();
        world.fabric.break_links(&devices.0, &devices.1);
        world.finish(&sent[1]);
        world.run_until("over", |world| !world.is_pending(&sent[0]));
        let _ = world.attention(0).take(sent[0].ticket).map(|_| ());
        world.run_until("down", |world| !world.is_complete());
        world.run_until("complete again", World::is_complete);
        assert!(world.events(Role::Attention, 1).iter().all(|event| !matches!(event, MeshEvent::LinkDown { .. })));
        world.exercise(round + 10);
    }
}

#[test]
fn transfers_go_on_without_a_scheduler() {
    let mut world = World::new(Shape::new(2, 2));
    let sessions: Vec<_> = world.places.iter().map(|place| place.session).collect();
    sessions.into_iter().for_each(|session| world.plane.vanish(session));
    world.exercise(1);
    let events = world.events(Role::Attention, 0);
    assert!(events.iter().any(|event| matches!(event, MeshEvent::SchedulerLost(why) if why == "connection reset")));
    assert!(!world.attention(0).is_complete() && world.attention(0).is_linked());
}
