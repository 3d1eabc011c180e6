//! The instructions that a round trip through the mesh takes, which no noise moves: they must not grow.
//!
//! Counted by callgrind over this very test binary, as the difference between many rounds and few. What the compiler
//! makes of the code decides, so that the figure is that of one compiler. After a change that is meant:
//! `STEPMESH_BLESS=1 cargo test -p stepmesh-bench --test instructions`.

use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use stepmesh_bench::pushpull::Turns;
use stepmesh_transport::Provider;

const RECORDED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/instructions.json");
const ROUNDS: &str = "STEPMESH_COUNT_ROUNDS";
/// The share by which it may grow.
const LEEWAY: f64 = 0.05;

/// What callgrind runs.
#[test]
fn rounds() {
    let rounds = std::env::var(ROUNDS).ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(10);
    let mut turns = Turns::join(Provider::Shm, [1, 1], 1).expect("a deployment");
    for _ in 0..rounds {
        turns.round().expect("a round");
    }
}

fn instructions(rounds: u32) -> f64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().expect("this test"))
        .args(["--exact", "rounds", "--test-threads=1"])
        .env(ROUNDS, rounds.to_string())
        .output()
        .expect("valgrind");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let collected = said.lines().find_map(|line| line.split_once("Collected :"));
    collected.and_then(|(_, count)| count.trim().parse().ok()).expect("a count")
}

fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn a_round_trip_takes_no_more_instructions_than_recorded() {
    let (Some(rustc), Some(_)) = (version("rustc"), version("valgrind")) else {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "valgrind is not installed");
        return println!("skipped: no valgrind");
    };
    let (few, many) = (2_000, 12_000);
    let per_round = (instructions(many) - instructions(few)) / f64::from(many - few);
    println!("{per_round:.0} instructions a round");
    assert!(per_round > 100.0, "nothing was counted");
    let path = Path::new(RECORDED);
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    if std::env::var_os("STEPMESH_BLESS").is_some() {
        let recorded = json!({ "rustc": rustc, "profile": profile, "instructions": per_round.round() });
        std::fs::write(path, format!("{recorded}\n")).expect("the record");
        return;
    }
    let recorded: Value = serde_json::from_str(&std::fs::read_to_string(path).expect("the record")).expect("JSON");
    if recorded["rustc"] != rustc.as_str() || recorded["profile"] != profile {
        return println!("skipped: recorded by {} in {}", recorded["rustc"], recorded["profile"]);
    }
    let before = recorded["instructions"].as_f64().expect("a number");
    assert!(per_round <= before * (1.0 + LEEWAY), "{per_round:.0} instructions a round, {before:.0} recorded");
}
