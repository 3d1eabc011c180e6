//! The latency suite from outside: what it prints, what it writes, how it ends.

#![allow(clippy::unwrap_used)]

mod common;

use common::{run, stepmesh};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

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

#[test]
fn where_there_is_no_gpu_its_suite_and_a_daemon_that_computes_on_one_say_what_to_install() {
    if !has_two_cpus() || Path::new("/dev/nvidiactl").exists() {
        return println!("skipped: one CPU, or a GPU");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("gpu.json");
    let command = stepmesh(&["bench", "gpu", "--json", file.to_str().unwrap()]);
    assert!(common::refuse(1, command).contains("install the NVIDIA driver"));
    assert!(!file.exists());
    let command = stepmesh(&["up", "--gpu", "0", "--attention", "1", "--ffn", "1"]);
    assert!(common::refuse(1, command).contains("install the NVIDIA driver"));
    let command = stepmesh(&["bench", "gpu", "--part", "everything"]);
    assert!(common::refuse(2, command).contains("`everything` is none of"));
}

/// An interpreter that answers as three of the peers in Python would: two are measured, one fails.
#[cfg(unix)]
fn interpreter(dir: &Path) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let script = r#"#!/bin/sh
case "$3 $4" in
    "version zeromq_numpy") echo 27.0 ;;
    "version nixl") echo 1.5 ;;
    "run zeromq_numpy") echo '{"p50_us": 50.0, "rounds": 3}' ;;
    "run nixl") echo "no such backend" >&2; exit 1 ;;
    "version ") echo 2.99 ;;
    "run /"*) [ -s "$4/config.json" ] && [ -s "$4/model.safetensors" ] && echo '{"tokens_per_s": 2.0}' ;;
    *) exit 1 ;;
esac
"#;
    let path = dir.join("python");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn compare_sets_each_peer_beside_ours_and_goes_on_when_one_fails() {
    if !has_two_cpus() {
        return println!("skipped: one CPU");
    }
    let dir = tempfile::tempdir().unwrap();
    let (python, file) = (interpreter(dir.path()), dir.path().join("compare.json"));
    let mut command = stepmesh(&["bench", "compare", "--provider", "shm", "--sizes", "8", "--bytes", "64:128,64:64"]);
    // Without the peers that this machine may have.
    command.env("PATH", "").args(["--quick", "--python"]).arg(&python).arg("--json").arg(&file);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("ucx-utils") && said.contains("mooncake-transfer-engine-non-cuda"), "{said}");
    let json: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let [first, failed, second] = json["results"].as_array().unwrap().as_slice() else { panic!("{json}") };
    for (row, reply_bytes) in [(first, 128), (second, 64)] {
        assert_eq!((row["peer"].as_str(), row["version"].as_str()), (Some("zeromq_numpy"), Some("27.0")));
        assert_eq!((row["bytes"].as_u64(), row["reply_bytes"].as_u64()), (Some(64), Some(reply_bytes)));
        let figure = |key: &str| row[key].as_f64().unwrap();
        assert!((figure("ratio") - figure("ours_p50_us") / 50.0).abs() < 1e-9, "{row}");
    }
    assert_eq!(failed["peer"], "nixl");
    assert!(failed["failed"].as_str().unwrap().contains("no such backend"), "{failed}");
}

#[test]
fn compare_without_any_peer_says_what_to_install() {
    if !has_two_cpus() {
        return println!("skipped: one CPU");
    }
    let mut command = stepmesh(&["bench", "compare", "--python", "/nowhere/python"]);
    command.env("PATH", "");
    let complaint = common::refuse(1, command);
    assert!(complaint.contains("none of the peers is installed"), "{complaint}");
}

#[test]
fn model_sets_products_beside_the_peak_and_decoding_beside_pytorch() {
    if !has_two_cpus() {
        return println!("skipped: one CPU");
    }
    let dir = tempfile::tempdir().unwrap();
    let python = interpreter(dir.path());
    let json =
        measure(&["model", "--new-tokens", "8", "--python", python.to_str().unwrap()], &dir.path().join("model.json"));
    let (decoding, products) = json["results"].as_array().unwrap().split_last().unwrap();
    let weights: Vec<_> = products.iter().map(|row| row["weights"].as_str().unwrap()).collect();
    assert_eq!(weights, ["f32", "bf16", "fp8", "w8a8"].repeat(2));
    for row in products {
        let (gflops, peak) = (row["gflops"].as_f64().unwrap(), row["floor"]["gflops"].as_f64().unwrap());
        assert!(gflops > 0.0 && (row["ratio"].as_f64().unwrap() - gflops / peak).abs() < 1e-9, "{row}");
    }
    let rate = decoding["tokens_per_s"].as_f64().unwrap();
    let peers = decoding["peers"].as_array().unwrap();
    assert_eq!(peers.iter().map(|peer| peer["dtype"].as_str().unwrap()).collect::<Vec<_>>(), ["bf16", "f32"]);
    for peer in peers {
        assert_eq!((peer["version"].as_str(), peer["tokens_per_s"].as_f64()), (Some("2.99"), Some(2.0)));
        assert!((peer["ratio"].as_f64().unwrap() - rate / 2.0).abs() < 1e-9, "{peer}");
    }
}

#[test]
fn model_without_pytorch_says_what_to_install_and_measures_the_rest() {
    if !has_two_cpus() {
        return println!("skipped: one CPU");
    }
    let output = run(&["bench", "model", "--quick", "--new-tokens", "8", "--python", "/nowhere/python"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("pip install torch safetensors") && said.contains("tokens/s"), "{said}");
}

#[test]
fn pipeline_measures_two_processes_unless_threads_are_asked_for() {
    if !has_two_cpus() {
        return println!("skipped: one CPU");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pipeline.json");
    // Stages of the first are long enough to sleep.
    for (flag, sides, clock, stage) in [
        ("--runs=1", "processes", "wall", "200"),
        ("--threads", "threads", "wall", "100"),
        ("--clock=virtual", "turns", "virtual", "200"),
    ] {
        let point = ["--attention-us", stage, "--ffn-us", stage, "--wire-us", "100"];
        let json = measure(&[&["pipeline", flag], &point[..]].concat(), &file);
        let [row] = json["results"].as_array().unwrap().as_slice() else { panic!("{json}") };
        assert_eq!((row["sides"].as_str(), row["clock"].as_str()), (Some(sides), Some(clock)));
        assert_eq!(row["scheduling"].is_string(), flag == "--runs=1", "{row}");
        assert_eq!(row["ideal_us"].as_f64(), Some(61.0 * 3.0 * stage.parse::<f64>().unwrap()));
        assert!(row["efficiency"].as_f64().unwrap() > 0.0, "{row}");
        for side in ["attention", "ffn"] {
            let cores = row["cores"][side].as_f64();
            assert_eq!(cores.is_some_and(|cores| cores > 0.0), clock == "wall", "{row}");
        }
    }
}

#[test]
fn pipeline_without_the_right_to_real_time_threads_says_so_and_measures_with_ordinary_ones() {
    let deprived = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-sys_nice", "--inh-caps=-sys_nice", env!("CARGO_BIN_EXE_stepmesh")]);
        command.args(arguments).output()
    };
    let works = deprived(&["--version"]).is_ok_and(|output| output.status.success());
    if !has_two_cpus() || !works {
        return println!("skipped: one CPU, or no setpriv that may take rights away");
    }
    let point = ["bench", "pipeline", "--quick", "--attention-us", "200", "--ffn-us", "200", "--wire-us", "100"];
    let output = deprived(&point).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("ordinary threads"), "{said}");
    let output = deprived(&[&point[..], &["--scheduling", "real-time"]].concat()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("CAP_SYS_NICE"), "{said}");
}

#[test]
fn scaling_measures_members_that_are_processes() {
    if !has_two_cpus() {
        return println!("skipped: one CPU");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("scaling.json");
    for provider in ["shm", "tcp"] {
        let json = measure(&["scaling", "--provider", provider, "--driver", "processes", "--members", "1,3"], &file);
        let rows = json["results"].as_array().unwrap();
        assert_eq!(rows.iter().map(|row| row["transfers"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 9]);
        for row in rows {
            assert_eq!((row["driver"].as_str(), row["provider"].as_str()), (Some("processes"), Some(provider)));
            assert!(row["round_us"].as_f64().unwrap() > 0.0 && row["cpu_us_per_transfer"].as_f64().unwrap() > 0.0);
        }
    }
}

#[test]
fn output_that_cannot_be_written_is_refused_before_anything_is_measured() {
    // Nobody, not even root, creates files there.
    for arguments in [
        ["bench", "pushpull", "--json", "/proc/stepmesh.json"],
        ["bench", "compare", "--json", "/nowhere/at/all.json"],
        ["bench", "model", "--json", "/proc/stepmesh.json"],
    ] {
        let started = std::time::Instant::now();
        let complaint = common::refuse(2, stepmesh(&arguments));
        assert!(complaint.contains(arguments[3]), "{complaint}");
        assert!(started.elapsed() < common::PATIENCE / 10, "{complaint}");
    }
}

#[test]
fn results_of_another_schema_are_refused_by_name_and_leave_no_page() {
    let dir = tempfile::tempdir().unwrap();
    let (old, page) = (dir.path().join("old.json"), dir.path().join("page.html"));
    for (text, what) in [
        ("not JSON", "is not JSON"),
        (r#"{"command": "stepmesh bench pushpull", "results": []}"#, "no `machine`"),
        (r#"{"machine": {}, "command": "x", "results": [{"op": "teleport"}]}"#, "result 0 is of no suite"),
    ] {
        std::fs::write(&old, text).unwrap();
        let arguments = ["bench", "report", old.to_str().unwrap(), "--html", page.to_str().unwrap()];
        let complaint = common::refuse(2, stepmesh(&arguments));
        assert!(complaint.contains("old.json") && complaint.contains(what), "{complaint}");
        assert!(!page.exists());
    }
}

#[test]
fn absurd_sizes_are_refused_before_anything_is_measured() {
    for arguments in [
        ["bench", "compare", "--sizes", "65MiB"],
        ["bench", "compare", "--bytes", "7168"],
        ["bench", "pushpull", "--bytes", "8:0"],
        ["bench", "pipeline", "--clock", "sundial"],
        ["bench", "scaling", "--members", "65"],
        ["bench", "model", "--batch", "257"],
        ["bench", "model", "--new-tokens", "1000"],
    ] {
        common::refuse(2, stepmesh(&arguments));
    }
    common::refuse(2, stepmesh(&["bench", "scaling", "--provider", "mem", "--driver", "processes"]));
}
