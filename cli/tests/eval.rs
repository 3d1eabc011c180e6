//! The daemons predict the held-out stories as well as PyTorch does with the same checkpoint.

#![allow(clippy::unwrap_used)]

mod common;

use common::{refuse, run, stepmesh};
use serde_json::Value;
use std::path::PathBuf;

fn story(file: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/step3-story")).join(file)
}

#[test]
fn the_held_out_loss_is_pytorchs_in_every_type() {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(story("golden.json")).unwrap()).unwrap();
    let golden = &golden["heldout"];
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("eval.json");
    for (dtype, reference, bound) in [
        ("f32", "loss_f32", 1e-4),
        ("bf16", "loss_bf16", 0.005),
        ("fp8", "loss_w8a8", 0.01),
        ("fp8-f32", "loss_w8a8", 0.01),
    ] {
        let texts = story("heldout.txt");
        let output = run(&["eval", texts.to_str().unwrap(), "--dtype", dtype, "--json", json.to_str().unwrap()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
        assert_eq!((&report["texts"], &report["tokens"]), (&golden["stories"], &golden["tokens"]));
        let (found, expected) = (report["loss"].as_f64().unwrap(), golden[reference].as_f64().unwrap());
        println!("{dtype}: {found:.5}, PyTorch {expected:.5}");
        assert!((found / expected - 1.0).abs() < bound, "{dtype}: {found} instead of {expected}");
    }
}

#[test]
fn texts_that_cannot_be_scored_are_refused_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("texts");
    std::fs::write(&path, format!("Tom is a boy.\n\n{}\n", "Tom ".repeat(600))).unwrap();
    let said = refuse(2, stepmesh(&["eval", path.to_str().unwrap()]));
    assert!(said.contains("line 3") && said.contains("2 to 512"), "{said}");
    std::fs::write(&path, "\n").unwrap();
    assert!(refuse(2, stepmesh(&["eval", path.to_str().unwrap()])).contains("no text"));
    assert!(refuse(2, stepmesh(&["eval", "/no/such/file"])).contains("/no/such/file"));
}
