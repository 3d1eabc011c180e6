//! Cancelled tickets and lost peers over real transports.

use crate::deployment::{Deployment, PATIENCE, PROVIDERS, Server, answer, eventually, finish, next, send};
use std::time::Duration;
use stepmesh_mesh::{MeshError, MeshEvent, Policy, Role, TicketFailure};

#[test]
fn a_cancelled_slot_comes_back_and_the_late_reply_never_shows_in_it() {
    for provider in PROVIDERS {
        let deployment = Deployment::new(provider, 1, 1);
        let (mut attention, mut ffn) = deployment.pair();
        for round in 0..3 {
            let given_up = send(&mut attention, 0, round, 1).unwrap();
            let batch = next(&mut ffn, Policy::Any);
            attention.cancel(given_up.ticket).unwrap();
            if round == 0 {
                let cancelled = attention.wait(given_up.ticket, PATIENCE);
                assert!(matches!(cancelled, Err(MeshError::Ticket(TicketFailure::Cancelled))));
            }
            assert!(attention.acquire(0).is_err(), "quarantined");
            std::thread::sleep(Duration::from_millis(20));
            answer(&mut ffn, batch);
            let sent = eventually(|| send(&mut attention, 0, round, 100));
            let batch = next(&mut ffn, Policy::Any);
            answer(&mut ffn, batch);
            finish(&mut attention, &sent);
        }
    }
}

#[test]
fn a_lost_ffn_instance_is_named_and_replaced() {
    for provider in PROVIDERS {
        let deployment = Deployment::new(provider, 1, 2);
        let mut attention = deployment.attention(0);
        let survivor = Server::start(deployment.ffn(0));
        let mut lost = deployment.ffn(1);
        attention.wait_complete(PATIENCE).unwrap();
        let sent = send(&mut attention, 1, 0, 1).unwrap();
        let held = next(&mut lost, Policy::All);
        drop(lost);
        let failed = attention.wait(sent.ticket, PATIENCE).map(|_| ());
        let Err(MeshError::Ticket(TicketFailure::PeerLost { peer, .. })) = failed else { panic!("{failed:?}") };
        assert_eq!((peer.role, peer.rank, peer.name.as_str()), (Role::Ffn, 1, "test-1"));
        let refused = attention.acquire(0).map(|_| ());
        assert!(matches!(refused, Err(MeshError::NotLinked(who)) if who == "ffn 1"));
        let lost =
            || std::iter::from_fn(|| attention.next_event()).find(|event| matches!(event, MeshEvent::PeerLost { .. }));
        assert!(wait_for(lost), "an event says so too");
        let replacement = Server::start(deployment.ffn(1));
        let sent = eventually(|| send(&mut attention, 1, 0, 2));
        finish(&mut attention, &sent);
        drop((held, survivor, replacement));
    }
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> bool {
    let began = std::time::Instant::now();
    while began.elapsed() < PATIENCE {
        if look().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

#[test]
fn a_lost_attention_instance_does_not_hold_the_others_up() {
    for provider in PROVIDERS {
        let deployment = Deployment::new(provider, 2, 1);
        let server = Server::start(deployment.ffn(0));
        let (mut survivor, mut lost) = (deployment.attention(0), deployment.attention(1));
        survivor.wait_complete(PATIENCE).unwrap();
        lost.wait_complete(PATIENCE).unwrap();
        let both = [send(&mut survivor, 0, 0, 1).unwrap(), send(&mut lost, 0, 0, 2).unwrap()];
        finish(&mut survivor, &both[0]);
        finish(&mut lost, &both[1]);
        let waits = send(&mut survivor, 0, 1, 3).unwrap();
        assert!(matches!(survivor.wait(waits.ticket, Duration::from_millis(30)), Err(MeshError::Timeout(_))));
        drop(lost);
        finish(&mut survivor, &waits);
        drop(server);
    }
}

#[test]
fn transfers_outlive_the_scheduler() {
    for provider in PROVIDERS {
        let deployment = Deployment::new(provider, 1, 1);
        let mut attention = deployment.attention(0);
        let server = Server::start(deployment.ffn(0));
        attention.wait_complete(PATIENCE).unwrap();
        drop(deployment);
        let lost =
            || std::iter::from_fn(|| attention.next_event()).find(|event| matches!(event, MeshEvent::SchedulerLost(_)));
        assert!(wait_for(lost));
        for round in 0..10 {
            let sent = send(&mut attention, 0, round, u64::from(round)).unwrap();
            finish(&mut attention, &sent);
        }
        drop(server);
    }
}
