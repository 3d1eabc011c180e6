//! `demo` yields the tokens and logits of the independent implementation, whatever the deployment.

#![allow(clippy::unwrap_used)]

mod common;

use common::{fixture, run};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::Path;

fn golden() -> Vec<(Vec<u64>, Vec<u64>)> {
    let text = std::fs::read_to_string(fixture().join("golden_f32.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    cases.iter().map(|case| (numbers(&case["prompt"]), numbers(&case["greedy"]))).collect()
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
}

fn demo(directory: &Path, arguments: &[&str]) -> Value {
    let json = directory.join("report.json");
    let checkpoint = fixture();
    let mut all = vec!["demo", "--checkpoint", checkpoint.to_str().unwrap(), "--json", json.to_str().unwrap()];
    all.extend(arguments);
    let output = run(&all);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    assert!(!output.stdout.contains(&0x1b), "control characters in a pipe");
    serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap()
}

fn sequences(report: &Value) -> Vec<(Vec<u64>, Vec<u64>)> {
    let sequences = report["sequences"].as_array().unwrap();
    sequences.iter().map(|sequence| (numbers(&sequence["prompt"]), numbers(&sequence["tokens"]))).collect()
}

#[test]
fn every_shape_of_deployment_over_both_transports_yields_the_reference_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = golden();
    expected.sort();
    for transport in ["shm", "tcp"] {
        for (attention, ffn, microbatches) in [("1", "1", "1"), ("2", "2", "3"), ("3", "1", "2"), ("1", "3", "3")] {
            let report = demo(
                dir.path(),
                &["--attention", attention, "--ffn", ffn, "--microbatches", microbatches, "--transport", transport],
            );
            let mut found = sequences(&report);
            found.sort();
            assert_eq!(found, expected, "{attention}A{ffn}F, {microbatches} microbatches over {transport}");
        }
    }
}

#[test]
fn the_report_has_every_field_that_others_read() {
    let dir = tempfile::tempdir().unwrap();
    let report = demo(dir.path(), &["--token-ids", "0,5,17", "--token-ids", "0", "--max-new-tokens", "7"]);
    assert_eq!(sequences(&report).iter().map(|(_, tokens)| tokens.len()).collect::<Vec<_>>(), [7, 7]);
    assert_eq!(sequences(&report)[0].0, [0, 5, 17]);
    let deployment = serde_json::json!(
        {"attention": 2, "ffn": 2, "microbatches": 3, "transport": "shm", "dtype": "f32"}
    );
    assert_eq!(report["deployment"], deployment);
    let figures = [
        &report["tokens_per_s"],
        &report["tpot_us"]["mean"],
        &report["tpot_us"]["p50"],
        &report["tpot_us"]["p99"],
        &report["a2f_us"]["p50"],
        &report["a2f_us"]["p99"],
        &report["f2a_us"]["p50"],
        &report["f2a_us"]["p99"],
    ];
    assert!(figures.iter().all(|figure| figure.as_f64().unwrap() > 0.0), "{report}");
    assert!((0.0..=1.0).contains(&report["stall_share"].as_f64().unwrap()), "{report}");
    assert_eq!(report.as_object().unwrap().len(), 7, "{report}");
}

#[test]
fn the_logits_of_every_new_position_are_the_references() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("logits.safetensors");
    let reference = std::fs::read(fixture().join("golden_f32.safetensors")).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    let prompts: Vec<String> =
        golden().iter().map(|(prompt, _)| prompt.iter().map(u64::to_string).collect::<Vec<_>>().join(",")).collect();
    let mut arguments = vec!["--logits", file.to_str().unwrap()];
    prompts.iter().for_each(|prompt| arguments.extend(["--token-ids", prompt]));
    demo(dir.path(), &arguments);

    let ours = std::fs::read(&file).unwrap();
    let ours = SafeTensors::deserialize(&ours).unwrap();
    for index in 0..prompts.len() {
        let found = ours.tensor(&format!("logits.{index}")).unwrap();
        assert_eq!(found.shape(), [32, 512]);
        let expected = expected_logits(&reference, index);
        let found = floats(found.data());
        assert_eq!(found.len(), expected.len());
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 2e-5, "sequence {index}: {worst}");
    }
}

/// The reference's logits of the positions that chose the new tokens.
fn expected_logits(reference: &SafeTensors<'_>, index: usize) -> Vec<f32> {
    let name = format!("logits.{index}");
    let tensor = reference.tensor(&name).unwrap_or_else(|_| panic!("{name}; there are {:?}", reference.names()));
    floats(tensor.data())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}
