//! Thousands of sequences that come, are cancelled and go: each gets what it would get alone, memory stays where it is,
//! nothing is left.

#![allow(clippy::unwrap_used)]

mod common;

use common::{PATIENCE, children, start, stepmesh};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use stepmesh_mesh::control::{Client, ConnectOptions};
use stepmesh_proto::control::generate_event::Body;
use stepmesh_proto::control::{GenerateRequest, Sampling};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const SEQUENCES: usize = 2000;
/// Different prompts, each run alone first.
const PROMPTS: usize = 40;
const LONGEST_PROMPT: usize = 40;
const LONGEST_ANSWER: u32 = 40;
/// More than fit into the key/value caches at once, so that some wait.
const IN_FLIGHT: usize = 48;
const VOCABULARY: u32 = 1000;

fn prompts() -> Vec<GenerateRequest> {
    let mut random = SmallRng::seed_from_u64(1);
    let mut request = |index: usize| {
        let length = random.random_range(1..=LONGEST_PROMPT);
        // Half of them greedy.
        let temperature = (index % 2) as f32;
        let sampling = Sampling { temperature, top_k: 0, top_p: 0.95, seed: random.random() };
        GenerateRequest {
            prompt: (0..length).map(|_| random.random_range(4..VOCABULARY)).collect(),
            max_new_tokens: LONGEST_ANSWER,
            ignore_eos: true,
            sampling: Some(sampling),
            ..GenerateRequest::default()
        }
    };
    (0..PROMPTS).map(&mut request).collect()
}

/// The tokens of a sequence, to its end or until it is cancelled after so many.
async fn tokens(client: &Client, request: GenerateRequest, cancelled_after: usize) -> Vec<u32> {
    let mut events = client.generate(request).await.unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < cancelled_after {
        match tokio::time::timeout(PATIENCE, events.next()).await.expect("a sequence is stuck").unwrap() {
            Some(Body::Token(token)) => tokens.push(token.token),
            Some(Body::Finished(_)) | None => break,
            Some(other) => panic!("{other:?}"),
        }
    }
    tokens
}

/// Resident memory of the processes, in KiB.
fn resident(pids: &[u32]) -> u64 {
    let of = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    pids.iter().map(of).sum()
}

#[test]
fn two_thousand_sequences_come_and_go() {
    let up = start(stepmesh(&["up", "--attention", "2", "--ffn", "2", "--kv-tokens", "1024"]));
    let ready = up.wait_for(|line| line.starts_with("ready "));
    let url = ready.strip_prefix("ready ").unwrap();
    let pids: Vec<_> = children(up.pid()).iter().map(|process| process.pid).collect();
    assert_eq!(pids.len(), 5);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = Client::connect(&ConnectOptions::new(url)).await.unwrap();
        let prompts = prompts();
        let mut alone = Vec::new();
        for prompt in &prompts {
            alone.push(tokens(&client, prompt.clone(), usize::MAX).await);
            assert_eq!(alone.last().unwrap().len(), LONGEST_ANSWER as usize);
        }
        let alone = Arc::new(alone);

        let (permits, cancelled) = (Arc::new(Semaphore::new(IN_FLIGHT)), Arc::new(AtomicUsize::new(0)));
        let mut random = SmallRng::seed_from_u64(2);
        let mut running = JoinSet::new();
        let (mut ended, mut half) = (0, 0);
        for number in 0..SEQUENCES {
            if random.random_bool(0.2) {
                tokio::time::sleep(Duration::from_micros(random.random_range(0..5000))).await;
            }
            let permit = permits.clone().acquire_owned().await.unwrap();
            let index = random.random_range(0..PROMPTS);
            let mut request = prompts[index].clone();
            request.max_new_tokens = random.random_range(1..=LONGEST_ANSWER);
            let cancelled_after = if random.random_bool(0.25) { random.random_range(0..8) } else { usize::MAX };
            let (client, alone, cancelled) = (client.clone(), alone.clone(), cancelled.clone());
            running.spawn(async move {
                let whole = request.max_new_tokens as usize;
                let found = tokens(&client, request, cancelled_after).await;
                drop(permit);
                cancelled.fetch_add(usize::from(found.len() < whole), Ordering::Relaxed);
                assert_eq!(found.len(), whole.min(cancelled_after), "sequence {number}");
                assert_eq!(found, alone[index][..found.len()], "sequence {number} differs from prompt {index} alone");
            });
            while let Some(done) = running.try_join_next() {
                done.unwrap();
                ended += 1;
            }
            if half == 0 && ended >= SEQUENCES / 2 {
                half = resident(&pids);
            }
        }
        while let Some(done) = running.join_next().await {
            done.unwrap();
        }
        let end = resident(&pids);
        let cancelled = cancelled.load(Ordering::Relaxed);
        println!("{SEQUENCES} sequences, {cancelled} cancelled; resident {half} KiB at half, {end} KiB at the end");
        assert!(cancelled > SEQUENCES / 10);
        assert!(end as f64 <= half as f64 * 1.02, "resident memory grew from {half} to {end} KiB");

        // Whatever was cancelled gave its blocks back: the longest sequence still finds room.
        let mut longest = prompts[0].clone();
        longest.max_new_tokens = 400;
        assert_eq!(tokens(&client, longest, usize::MAX).await.len(), 400);
    });
}
