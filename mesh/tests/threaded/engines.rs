//! The verbs of an engine: who owns a slot when, how long calls wait, how threads are named, pinned and ended.

use crate::deployment::{Deployment, PATIENCE, PROVIDERS, Server, answer, check, eventually, finish, next, send};
use std::time::{Duration, Instant};
use stepmesh_mesh::threaded::AttentionEngine;
use stepmesh_mesh::{MeshError, Policy, Request};
use stepmesh_transport::{Provider, TransportError};

fn blocks(engine: &mut AttentionEngine, microbatch: u16) -> bool {
    matches!(engine.acquire(microbatch), Err(MeshError::WouldBlock(of)) if of == microbatch)
        && matches!(engine.leave(microbatch), Err(MeshError::WouldBlock(_)))
}

#[test]
fn a_slot_has_one_owner_at_a_time() {
    for provider in PROVIDERS {
        let deployment = Deployment::new(provider, 1, 1);
        let (mut attention, mut ffn) = deployment.pair();
        let buffer = attention.acquire(0).unwrap();
        assert!(blocks(&mut attention, 0), "while it is filled");
        drop(buffer);
        let sent = send(&mut attention, 0, 0, 1).unwrap();
        assert!(blocks(&mut attention, 0), "while the request is under way");
        assert!(!attention.is_over(sent.ticket));
        let batch = next(&mut ffn, Policy::All);
        answer(&mut ffn, batch);
        let reply = attention.wait(sent.ticket, PATIENCE).unwrap();
        assert!(blocks(&mut attention, 0), "while the reply is held");
        assert!(attention.acquire(1).is_ok(), "another slot is free");
        // A reply may be read on another thread, and while other transfers go on.
        let other = send(&mut attention, 1, 0, 2).unwrap();
        let batch = next(&mut ffn, Policy::All);
        answer(&mut ffn, batch);
        finish(&mut attention, &other);
        std::thread::scope(|scope| scope.spawn(|| check(&sent, &reply)).join()).unwrap();
        drop(reply);
        assert!(attention.acquire(0).is_ok(), "at once, without a round trip");
        assert!(matches!(attention.wait(sent.ticket, PATIENCE), Err(MeshError::UnknownTicket(_))));
        assert!(matches!(attention.acquire(3), Err(MeshError::NoMicrobatch { slot: 3, microbatches: 3 })));
    }
}

#[test]
fn an_expired_wait_leaves_the_ticket_outstanding() {
    let deployment = Deployment::new(Provider::Shm, 1, 1);
    let (mut attention, mut ffn) = deployment.pair();
    let sent = send(&mut attention, 2, 0, 1).unwrap();
    for timeout in [Duration::ZERO, Duration::from_millis(20)] {
        let began = Instant::now();
        assert!(matches!(attention.wait(sent.ticket, timeout), Err(MeshError::Timeout(_))));
        assert!(began.elapsed() >= timeout);
    }
    let batch = next(&mut ffn, Policy::All);
    answer(&mut ffn, batch);
    finish(&mut attention, &sent);
}

#[test]
fn next_batch_keeps_to_its_policy_and_timeout() {
    let deployment = Deployment::new(Provider::Shm, 2, 1);
    let (mut ffn, mut attention) = (deployment.ffn(0), [deployment.attention(0), deployment.attention(1)]);
    attention.iter_mut().for_each(|engine| engine.wait_complete(PATIENCE).unwrap());
    ffn.wait_complete(PATIENCE).unwrap();
    while ffn.next_event().is_some() {}
    let began = Instant::now();
    assert!(ffn.next_batch(Policy::Any, Duration::from_millis(30)).unwrap().is_none());
    assert!(began.elapsed() >= Duration::from_millis(30));
    // Once both have taken part, either is waited for.
    for engine in &mut attention {
        let sent = send(engine, 0, 0, 1).unwrap();
        let batch = next(&mut ffn, Policy::Any);
        answer(&mut ffn, batch);
        finish(engine, &sent);
    }
    let first: Vec<_> = attention.iter_mut().map(|engine| send(engine, 0, 1, 1).unwrap()).collect();
    let batch = next(&mut ffn, Policy::AtLeast(2));
    assert_eq!(batch.segments.len(), 2);
    answer(&mut ffn, batch);
    for (engine, sent) in attention.iter_mut().zip(&first) {
        finish(engine, sent);
    }
    let second = send(&mut attention[1], 0, 2, 1).unwrap();
    assert!(ffn.next_batch(Policy::All, Duration::from_millis(30)).unwrap().is_none(), "rank 0 can still reach it");
    let began = Instant::now();
    let batch = next(&mut ffn, Policy::Deadline(Duration::from_millis(100)));
    assert_eq!(batch.segments[0].rank(), 1);
    assert!(began.elapsed() < PATIENCE / 2, "woken by the deadline, not by chance");
    answer(&mut ffn, batch);
    finish(&mut attention[1], &second);
    let array = ffn.part_array(0, 0).unwrap();
    assert!(array.base > 0 && array.rank_stride_bytes % 4096 == 0);
    assert_eq!((ffn.ffn(), ffn.attention()), (1, 2));
}

#[test]
fn what_does_not_fit_is_refused_at_once() {
    let deployment = Deployment::new(Provider::Shm, 1, 1);
    let (mut attention, _ffn) = deployment.pair();
    let part = stepmesh_proto::Part { key: 7, rows: 33, row_bytes: 1024, ..Default::default() };
    let buffer = attention.acquire(0).unwrap();
    let refused = attention.push_pull(buffer, Request { parts: &[part], ..Request::default() });
    assert!(matches!(refused, Err(MeshError::Transfer(why)) if why.contains("key 7")));
    let elsewhere = Deployment::new(Provider::Shm, 1, 1);
    let (mut other, _other_ffn) = elsewhere.pair();
    let foreign = other.acquire(0).unwrap();
    let refused = attention.push_pull(foreign, Request::default());
    assert!(matches!(refused, Err(MeshError::Transfer(why)) if why.contains("another mesh")));
    assert!(attention.acquire(0).is_ok());
}

#[test]
fn an_engine_is_named_and_pinned_or_says_why_not() {
    let mut deployment = Deployment::new(Provider::Shm, 1, 1);
    deployment.progress.name = "pinned-engine".into();
    deployment.progress.cpu = Some(0);
    let (_attention, _ffn) = deployment.pair();
    let pinned = threads("pinned-engine");
    assert_eq!(pinned.len(), 2);
    for task in pinned {
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        let allowed = status.lines().find(|line| line.starts_with("Cpus_allowed_list:")).unwrap();
        assert_eq!(allowed.split_whitespace().last(), Some("0"));
    }
}

#[test]
fn a_cpu_or_a_name_that_cannot_be_is_refused() {
    let refused = |cpu: Option<usize>, name: &str| {
        let clock = stepmesh_transport::Clock::system();
        let device = stepmesh_transport::open(Provider::Shm, &Default::default()).unwrap();
        let layout = stepmesh_mesh::SlotLayout::new(1, vec![], vec![]).unwrap();
        let options = stepmesh_mesh::MemberOptions::new(layout, "echo");
        let deployment = Deployment::new(Provider::Shm, 1, 1);
        let connect = stepmesh_mesh::control::ConnectOptions::new(deployment.scheduler.url());
        let control = stepmesh_mesh::control::GrpcControl::connect(connect, Box::new(|| {})).unwrap();
        let mesh = stepmesh_mesh::AttentionMesh::new(options, device, Box::new(control), clock).unwrap();
        let progress = stepmesh_mesh::threaded::ProgressOptions { cpu, name: name.into(), ..Default::default() };
        match AttentionEngine::start(mesh, progress).map(|_| ()).unwrap_err() {
            MeshError::Transport(error @ (TransportError::System { .. } | TransportError::Invalid { .. })) => {
                error.to_string()
            }
            error => panic!("{error}"),
        }
    };
    assert!(refused(Some(1023), "x").contains("CPU 1023"));
    assert!(refused(Some(usize::MAX), "x").contains("CPU 18446744073709551615"));
    assert!(refused(None, "a\0b").contains("cannot be named"));
}

#[test]
fn an_idle_engine_sleeps() {
    let mut deployment = Deployment::new(Provider::Tcp, 1, 1);
    deployment.progress.name = "idle-engine".into();
    let (mut attention, mut ffn) = deployment.pair();
    let waiting = std::thread::spawn(move || ffn.next_batch(Policy::All, Duration::from_secs(2)).unwrap().is_none());
    let before = ticks("idle-engine");
    std::thread::sleep(Duration::from_secs(1));
    let spent = ticks("idle-engine") - before;
    assert!(spent <= 3, "two idle threads spent {spent} ticks of 10 ms in a second");
    attention.sleep(Duration::ZERO).unwrap();
    assert!(waiting.join().unwrap());
}

/// Over tcp nothing moves unless somebody polls.
#[test]
fn replies_land_while_the_application_computes() {
    let deployment = Deployment::new(Provider::Tcp, 1, 1);
    let (mut attention, ffn) = deployment.pair();
    let _server = Server::start(ffn);
    // On a machine that is busy with other things it may take more than one try.
    for round in 0..50 {
        let began = Instant::now();
        let sent = send(&mut attention, 0, round, 1).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let called = began.elapsed();
        let reply = attention.wait(sent.ticket, PATIENCE).unwrap();
        check(&sent, &reply);
        if Duration::from_nanos(reply.trace(0).round_trip_ns) < called / 2 {
            return;
        }
    }
    panic!("nothing lands before the application calls");
}

#[test]
fn a_sleep_ends_when_a_reply_has_come_or_another_thread_calls() {
    let deployment = Deployment::new(Provider::Shm, 1, 1);
    let (mut attention, ffn) = deployment.pair();
    let _server = Server::start(ffn);
    while attention.next_event().is_some() {}
    for round in 0..100 {
        let sent = send(&mut attention, 0, round, 1).unwrap();
        let began = Instant::now();
        while !attention.is_over(sent.ticket) {
            attention.sleep(PATIENCE).unwrap();
        }
        assert!(began.elapsed() < PATIENCE);
        finish(&mut attention, &sent);
    }
    let waker = attention.waker();
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            waker.wake();
        });
        while began.elapsed() < Duration::from_millis(20) {
            attention.sleep(PATIENCE).unwrap();
        }
    });
    assert!(began.elapsed() < PATIENCE);
}

#[test]
fn dropping_an_engine_ends_its_thread_soon_whatever_is_under_way() {
    for provider in PROVIDERS {
        let mut deployment = Deployment::new(provider, 1, 1);
        deployment.progress.name = format!("ending-{provider}");
        let (mut attention, mut ffn) = deployment.pair();
        let sent = send(&mut attention, 0, 0, 1).unwrap();
        let buffer = attention.acquire(1).unwrap();
        let batch = next(&mut ffn, Policy::All);
        answer(&mut ffn, batch);
        let reply = attention.wait(sent.ticket, PATIENCE).unwrap();
        send(&mut attention, 2, 0, 1).unwrap();
        let held = next(&mut ffn, Policy::All);
        let began = Instant::now();
        drop(attention);
        drop(ffn);
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(threads(&format!("ending-{provider}")).is_empty());
        // What was handed out outlives the engine.
        check(&sent, &reply);
        assert_eq!(held.segments.len(), 1);
        drop((buffer, held));
    }
}

#[test]
fn a_member_that_is_refused_ends_its_thread_with_that_error() {
    let deployment = Deployment::new(Provider::Shm, 1, 1);
    let (mut attention, _ffn) = deployment.pair();
    let mut second = deployment.attention(0);
    let refused = second.wait_complete(PATIENCE);
    let Err(MeshError::Ended(error)) = refused else { panic!("{refused:?}") };
    assert!(matches!(&*error, MeshError::Refused(why) if why.contains("taken by attention rank 0")), "{error}");
    assert!(matches!(second.acquire(0), Err(MeshError::Ended(_))));
    assert!(matches!(second.leave(0), Err(MeshError::Ended(_))));
    assert!(attention.acquire(0).is_ok(), "the first is not disturbed");
    let mut third = deployment.ffn(0);
    assert!(matches!(third.wait_complete(PATIENCE), Err(MeshError::Ended(_))));
    assert!(matches!(third.next_batch(Policy::All, PATIENCE), Err(MeshError::Ended(_))));
    eventually(|| attention.acquire(1).map(drop));
}

/// This process's threads of that name.
fn threads(name: &str) -> Vec<std::path::PathBuf> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let is_called = |task: &std::path::PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    tasks.filter(is_called).collect()
}

/// The CPU time that they have taken.
fn ticks(name: &str) -> u64 {
    let spent = |task: &std::path::PathBuf| {
        let stat = std::fs::read_to_string(task.join("stat")).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    threads(name).iter().map(spent).sum()
}
