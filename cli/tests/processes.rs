//! However a command ends, it says why, and none of its processes outlives it.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Process, Running, children, fixture, has_ended, is_gone, signal, start, stepmesh, within};
use std::time::{Duration, Instant};

/// A demo that repeats, and its children once they decode.
fn looping(arguments: &[&str]) -> (Running, Vec<Process>) {
    let mut all = vec!["demo", "--loop"];
    all.extend(arguments);
    let demo = start(stepmesh(&all));
    demo.wait_for(|line| line.starts_with("round "));
    let processes = children(demo.pid());
    assert_eq!(processes.len(), 5, "{processes:?}");
    (demo, processes)
}

fn shared_memory() -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> =
        std::fs::read_dir("/dev/shm").into_iter().flatten().flatten().map(|e| e.file_name()).collect();
    names.sort();
    names
}

/// Kills one daemon of a kind; the demo must name it within a second and leave nothing behind.
fn lose(role: &str, arguments: &[&str]) {
    let before = shared_memory();
    let (mut demo, processes) = looping(arguments);
    let victim = processes.iter().find(|process| process.role == role).unwrap();
    let started = Instant::now();
    signal(victim.pid, "-KILL");
    let (code, _) = demo.wait();
    let took = started.elapsed();
    let said = demo.rest_of_errors();
    assert_eq!(code, Some(1), "{said}");
    assert!(took < Duration::from_secs(1), "{took:?}: {said}");
    let last = said.lines().last().unwrap_or_default();
    let called = last.strip_prefix("error: ").and_then(|line| line.split(" (pid ").next()).unwrap_or_default();
    assert_eq!(last, format!("error: {called} (pid {}) was killed by signal 9", victim.pid), "{said}");
    assert!(called.starts_with(role), "{said}");
    // So do the others, each in its own words.
    let lost = if role == "scheduler" { "scheduler is lost".to_owned() } else { format!("pid {}", victim.pid) };
    for label in ["attention 0", "attention 1", "ffn 0", "ffn 1"].into_iter().filter(|label| *label != called) {
        let reports = |line: &str| line.starts_with(&format!("[{label}] ")) && line.contains(&lost);
        assert!(said.lines().any(reports), "{label} does not say what was lost: {said}");
    }
    for process in processes {
        assert!(is_gone(process.pid), "{process:?} is left");
    }
    assert_eq!(shared_memory(), before);
}

#[test]
fn an_ffn_daemon_that_is_killed_is_named() {
    lose("ffn", &[]);
}

#[test]
fn an_attention_daemon_that_is_killed_is_named() {
    lose("attention", &[]);
}

#[test]
fn a_scheduler_that_is_killed_is_named() {
    lose("scheduler", &[]);
}

#[test]
fn over_tcp_too() {
    lose("ffn", &["--transport", "tcp"]);
}

#[test]
fn interrupting_a_loop_is_its_orderly_end() {
    for name in ["-INT", "-TERM"] {
        let (mut demo, processes) = looping(&[]);
        signal(demo.pid(), name);
        let (code, took) = demo.wait();
        assert_eq!(code, Some(0), "{}", demo.rest_of_errors());
        assert!(took < Duration::from_secs(3), "{took:?}");
        assert!(processes.iter().all(|process| is_gone(process.pid)));
        demo.wait_for(|line| line.starts_with("throughput"));
    }
}

#[test]
fn interrupting_before_the_end_of_the_work_says_so() {
    let checkpoint = fixture();
    let checkpoint = checkpoint.to_str().unwrap();
    let mut demo = start(stepmesh(&["demo", "--checkpoint", checkpoint, "--max-new-tokens", "900"]));
    demo.wait_for(|line| line.starts_with("complete"));
    let processes = children(demo.pid());
    signal(demo.pid(), "-INT");
    let (code, took) = demo.wait();
    assert_eq!(code, Some(130), "{}", demo.rest_of_errors());
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert!(processes.iter().all(|process| is_gone(process.pid)));
}

#[test]
fn no_process_outlives_a_command_that_is_killed() {
    let (mut demo, processes) = looping(&[]);
    signal(demo.pid(), "-KILL");
    demo.wait();
    for process in processes {
        assert!(within(Duration::from_secs(6), || has_ended(process.pid)), "{process:?} is left");
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_demo() {
    let (mut demo, processes) = looping(&[]);
    // Dropping the receiver ends the thread that reads, which closes the pipe.
    demo.out = std::sync::mpsc::channel().1;
    let (code, _) = demo.wait();
    assert_eq!(code, Some(1));
    assert!(processes.iter().all(|process| is_gone(process.pid)));
    assert!(!demo.rest_of_errors().contains("panicked"));
}
