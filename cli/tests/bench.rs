//! The latency suite from outside: what it prints, what it writes, how it ends.

#![allow(clippy::unwrap_used)]

mod common;

use common::{run, stepmesh};
use serde_json::Value;
use std::path::Path;

fn has_two_cpus() -> bool {
    std::thread::available_parallelism().map_or(1, usize::from) >= 2
}

/// Runs a suite that must end well; the JSON that it wrote.
fn measure(arguments: &[&str], file: &Path) -> Value {
    let output = run(&[&["bench"], arguments, &["--quick", "--json", file.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert!(json["command"].as_str().unwrap().starts_with("stepmesh bench "));
    assert!(json["machine"]["pinned"].as_array().unwrap().len() >= 2);
    json
}

#[test]
fn transport_prints_a_table_and_writes_the_same_as_json() {
    if !has_two_cpus() {
        return println!("skipped: one CPU");
    }
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["transport", "--provider", "tcp", "--sizes", "8,64KiB", "--peers", "none"];
    let json = measure(&arguments, &dir.path().join("tcp.json"));
    let rows = json["results"].as_array().unwrap();
    let named = |op: &str| rows.iter().filter(|row| row["op"] == op).count();
    assert_eq!((named("pingpong"), named("stream"), named("stream_both")), (2, 1, 1));
    for row in rows {
        let floor = if row["op"] == "pingpong" { "p50_us" } else { "gbytes_per_s" };
        assert!(row["floor"]["name"].is_string() && row["floor"][floor].is_f64() && row["ratio"].is_f64(), "{row}");
        assert!(row["p50_us"].is_f64() && row["p99_us"].is_f64() && row["gbytes_per_s"].is_f64(), "{row}");
    }
}

#[test]
fn a_run_that_cannot_go_on_says_why_and_leaves_no_empty_file() {
    if !has_two_cpus() || Path::new("/sys/class/infiniband").exists() {
        return println!("skipped: one CPU, or RDMA devices");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("verbs.json");
    let command = stepmesh(&["bench", "transport", "--provider", "verbs", "--json", file.to_str().unwrap()]);
    assert!(common::refuse(1, command).contains("RDMA"));
    assert!(!file.exists());
}
