//! What the steady state asks of the kernel: nothing over shm, and over tcp only to send, to receive and for events.
//!
//! The test binary runs itself under `strace -c -f`, twice, the second time with more transfers, and compares the counts.
//! Without strace, or where it may not trace, it passes with a line that says so, unless `CI=true`.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use stepmesh_transport::testing::{A, B, Fixture, World, write_immediate};
use stepmesh_transport::{Access, Completion, Device, DeviceOptions, Provider, Work};

const VARIABLE: &str = "STEPMESH_TRANSFERS";
const FEW: usize = 500;
const MANY: usize = 20_500;
/// Calls of a run's beginning and end that are not the same in every run.
const NOISE: i64 = 50;

struct Local(Provider);

impl Fixture for Local {
    fn device(&mut self) -> std::sync::Arc<dyn Device> {
        stepmesh_transport::open(self.0, &DeviceOptions::default()).unwrap()
    }
}

/// Not a test of its own: the process that is traced. Round trips of 64 bytes and of 20,000, polled without a pause.
#[test]
fn traced() {
    let Ok(what) = std::env::var(VARIABLE) else { return };
    let (provider, transfers) = what.split_once(' ').unwrap();
    let mut fixture = Local(provider.parse().unwrap());
    let (mut world, link) = World::connected(&mut fixture, 1);
    let len = 20_000;
    let granted = [B, A].map(|granter| world.grant(link, granter, len, Access::PeerWrite));
    let sources = [A, B].map(|end| world.ends[end].source(end as u64, len));
    let mut seen = Vec::with_capacity(1024);
    for transfer in 0..transfers.parse::<usize>().unwrap() {
        for from in [A, B] {
            let range = 0..if transfer % 2 == 0 { 64 } else { len };
            let op = write_immediate(&sources[from], range, &granted[from].remote, 0, transfer as u32);
            world.ends[from].endpoint.post(link.0[from], 0, &[Work { op, signal: None }]).unwrap();
            let arrived = |seen: &[Completion]| seen.iter().any(|seen| matches!(seen, Completion::Immediate { .. }));
            while !arrived(&seen) {
                for end in [B, A] {
                    world.ends[end].endpoint.poll(&mut seen).unwrap();
                }
            }
            seen.clear();
        }
    }
}

/// How often each call was made, in all threads.
fn calls(provider: Provider, transfers: usize) -> Option<BTreeMap<String, i64>> {
    let table = std::env::temp_dir().join(format!("stepmesh-calls-{}-{provider}-{transfers}", std::process::id()));
    let status = Command::new("strace")
        .args(["-c", "-f", "-o"])
        .arg(&table)
        .arg(std::env::current_exe().unwrap())
        .args(["traced", "--exact", "--test-threads=1"])
        .env(VARIABLE, format!("{provider} {transfers}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let text = std::fs::read_to_string(&table).unwrap_or_default();
    let _ = std::fs::remove_file(&table);
    let counts: BTreeMap<_, _> = text.lines().filter_map(count).collect();
    let able = status.is_ok_and(|status| status.success()) && !counts.is_empty();
    if !able {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "strace cannot trace here:\n{text}");
        println!("skipped: strace is not installed, or may not trace here");
    }
    able.then_some(counts)
}

/// A line of strace's table: share, seconds, µs a call, calls, perhaps errors, name.
fn count(line: &str) -> Option<(String, i64)> {
    let words: Vec<_> = line.split_whitespace().collect();
    let name = words.last().filter(|name| **name != "total")?;
    Some(((*name).to_owned(), words.get(3)?.parse().ok()?))
}

/// The calls that further transfers add.
fn added(provider: Provider) -> Option<BTreeMap<String, i64>> {
    let (few, many) = (calls(provider, FEW)?, calls(provider, MANY)?);
    let added = many.into_iter().map(|(name, count)| {
        let before = few.get(&name).copied().unwrap_or(0);
        (name, count - before)
    });
    Some(added.filter(|(_, count)| *count != 0).collect())
}

#[test]
fn shm_makes_no_system_call_in_its_steady_state() {
    let Some(added) = added(Provider::Shm) else { return };
    assert!(added.values().sum::<i64>() < NOISE, "{} round trips added {added:?}", MANY - FEW);
}

#[test]
fn tcp_only_sends_receives_and_asks_for_events_in_its_steady_state() {
    let Some(mut added) = added(Provider::Tcp) else { return };
    let round_trips = (MANY - FEW) as i64;
    let count = |names: [&str; 2]| names.iter().filter_map(|name| added.get(*name)).sum::<i64>();
    assert!(count(["sendto", "sendmsg"]) >= 2 * round_trips, "{added:?}");
    assert!(count(["recvfrom", "readv"]) >= 2 * round_trips, "{added:?}");
    let known = ["sendto", "sendmsg", "recvfrom", "readv"];
    added.retain(|name, _| !(known.contains(&name.as_str()) || name.starts_with("epoll_")));
    assert!(added.values().sum::<i64>() < NOISE, "{round_trips} round trips added {added:?} too");
}
