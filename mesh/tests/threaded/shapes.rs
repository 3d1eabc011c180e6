//! Deployments of every shape, each attention instance with an application's thread of its own.

use crate::deployment::{Deployment, MICROBATCHES, PATIENCE, PROVIDERS, Server, check, finish, send};
use std::time::Duration;

const ROUNDS: u32 = 60;

fn run(deployment: &Deployment, attention: u32, ffn: u32) {
    let servers: Vec<_> = (0..ffn).map(|rank| Server::start(deployment.ffn(rank))).collect();
    std::thread::scope(|scope| {
        for rank in 0..attention {
            scope.spawn(move || {
                let mut engine = deployment.attention(rank);
                engine.wait_complete(PATIENCE).unwrap();
                assert_eq!((engine.rank(), engine.ffn()), (Some(rank), ffn as usize));
                for round in 0..ROUNDS {
                    let seed = u64::from(rank * 1000 + round);
                    let sent: Vec<_> = (0..MICROBATCHES)
                        .map(|microbatch| send(&mut engine, microbatch, round, seed + u64::from(microbatch)).unwrap())
                        .collect();
                    // In another order than sent.
                    sent.iter().rev().for_each(|sent| finish(&mut engine, sent));
                }
                for microbatch in 0..MICROBATCHES {
                    engine.leave(microbatch).unwrap();
                }
                // A leave takes a round trip.
                crate::deployment::eventually(|| engine.acquire(MICROBATCHES - 1).map(drop));
            });
        }
    });
    drop(servers);
}

#[test]
fn every_shape_works_over_every_transport() {
    for provider in PROVIDERS {
        for (attention, ffn) in [(1, 1), (2, 2), (3, 1), (1, 3), (4, 2)] {
            run(&Deployment::new(provider, attention, ffn), attention, ffn);
        }
    }
}

#[test]
fn more_spinning_threads_than_cores_stay_live() {
    for provider in PROVIDERS {
        let mut deployment = Deployment::new(provider, 2, 2);
        deployment.progress.spin = Duration::from_micros(500);
        run(&deployment, 2, 2);
    }
}

#[test]
fn several_deployments_live_in_one_process() {
    std::thread::scope(|scope| {
        for provider in [PROVIDERS[0], PROVIDERS[0], PROVIDERS[1]] {
            scope.spawn(move || run(&Deployment::new(provider, 1, 2), 1, 2));
        }
    });
}

#[test]
fn a_wait_may_be_as_long_as_a_duration_can_say() {
    for provider in PROVIDERS {
        let deployment = Deployment::new(provider, 1, 1);
        let _server = Server::start(deployment.ffn(0));
        let mut engine = deployment.attention(0);
        engine.wait_complete(Duration::MAX).unwrap();
        let sent = send(&mut engine, 0, 0, 1).unwrap();
        check(&sent, &engine.wait(sent.ticket, Duration::MAX).unwrap());
    }
}
