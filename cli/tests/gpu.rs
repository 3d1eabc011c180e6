//! Daemons as processes that compute on one GPU and have their slots in its memory. Where there is none, on a double of one
//! (`stepmesh-fake-gpu`).
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{fixture, stepmesh};
use serde_json::Value;
use stepmesh_fake_cuda::harness::give_gpu;

#[test]
fn processes_share_the_memory_of_a_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let (json, checkpoint) = (dir.path().join("report.json"), fixture());
    let text = std::fs::read_to_string(checkpoint.join("golden_f32.json")).unwrap();
    let golden: Value = serde_json::from_str::<Value>(&text).unwrap()[0].take();
    let list = |value: &Value| -> Vec<String> { value.as_array().unwrap().iter().map(Value::to_string).collect() };
    let prompt = list(&golden["prompt"]).join(",");
    let mut command = stepmesh(&["demo", "--gpu", "0", "--attention", "2", "--ffn", "2", "--max-new-tokens", "4"]);
    command.args(["--token-ids", &prompt, "--checkpoint", checkpoint.to_str().unwrap()]);
    command.args(["--json", json.to_str().unwrap()]);
    let Some(_gpu) = give_gpu(&mut command) else { return };
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(list(&report["sequences"][0]["tokens"]), list(&golden["greedy"])[..4]);
    assert_eq!((&report["deployment"]["gpu"], &report["deployment"]["slots"]), (&Value::from(0), &Value::from("gpu")));
}
