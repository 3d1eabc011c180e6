//! Bad input is refused by name, with an exit code that says whose fault it is, before anything is started.

#![allow(clippy::unwrap_used)]

mod common;

use common::{fixture, refuse, run, stepmesh};
use std::net::TcpListener;
use std::path::Path;
use tempfile::TempDir;

fn refused(arguments: &[&str]) -> String {
    refuse(2, stepmesh(arguments))
}

fn assert_names(said: &str, names: &[&str]) {
    for name in names {
        assert!(said.contains(name), "`{name}` is not in: {said}");
    }
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused() {
    assert_names(&refused(&["demo", "--attention", "0"]), &["'0'", "--attention"]);
    assert_names(&refused(&["demo", "--transport", "mem"]), &["'mem'", "shm", "tcp"]);
    assert_names(&refused(&["demo", "--dtype", "f16"]), &["'f16'", "bf16"]);
    assert_names(&refused(&["demo", "--atention", "2"]), &["--atention", "--attention"]);
    assert_names(&refused(&["demo", "--max-new-tokens", "0"]), &["'0'", "--max-new-tokens"]);
    assert_names(&refused(&["demo", "--prompt", "hi", "--token-ids", "0"]), &["--prompt", "--token-ids"]);
    assert_names(&refused(&["generate", "--token-ids", "0"]), &["--scheduler"]);
    assert_names(&refused(&["generate", "--scheduler", "http://127.0.0.1:1"]), &["nothing to generate from"]);
    assert_names(&refused(&["generate", "--scheduler", "ftp://x", "--token-ids", "0"]), &["ftp://x"]);
}

#[test]
fn a_prompt_that_the_model_cannot_take_is_refused_before_anything_starts() {
    let long = vec!["0"; 1000].join(",");
    let cases: [(&[&str], &[&str]); 8] = [
        (&["--token-ids", ""], &["empty prompt"]),
        (&["--token-ids", "0,x"], &["`x`", "not a token id"]),
        (&["--token-ids", "-3"], &["`-3`"]),
        (&["--token-ids", "0,512"], &["prompt 0", "512", "ids 0 to 511"]),
        (&["--token-ids", "0", "--token-ids", &long], &["prompt 1", "1032", "context of 1024"]),
        (&["--prompt", "hello"], &["tokenizer.json", "--token-ids"]),
        (&["--token-ids", "0", "--temperature", "-1"], &["--temperature", "-1"]),
        (&["--token-ids", "0", "--tensor-parallel", "0"], &["--tensor-parallel"]),
    ];
    let checkpoint = fixture();
    for (arguments, names) in cases {
        let mut all = vec!["demo", "--checkpoint", checkpoint.to_str().unwrap()];
        all.extend(arguments);
        assert_names(&refused(&all), names);
    }
    assert_names(&refused(&["demo", "--prompt", " "]), &["--prompt is empty"]);
}

#[test]
fn an_output_file_that_cannot_be_written_is_refused_before_anything_starts() {
    for flag in ["--json", "--logits"] {
        assert_names(&refused(&["demo", flag, "/no/such/directory/file"]), &["/no/such/directory/file"]);
    }
}

#[test]
fn a_measurement_that_cannot_be_made_is_refused_before_anything_starts() {
    let bench = |arguments: &[&str]| refused(&[&["bench", "transport", "--quick"], arguments].concat());
    assert_names(&bench(&[]), &["--provider"]);
    assert_names(&bench(&["--provider", "mem"]), &["'mem'", "shm", "tcp"]);
    for sizes in ["0", "8,", "1e99", "7KB", "65MiB"] {
        assert_names(&bench(&["--provider", "shm", "--sizes", sizes]), &["--sizes"]);
    }
    assert_names(&bench(&["--provider", "shm", "--cpus", "0"]), &["--cpus", "comma"]);
    assert_names(&bench(&["--provider", "shm", "--cpus", "0,0"]), &["CPU 0", "two CPUs"]);
    assert_names(&bench(&["--provider", "shm", "--cpus", "0,99999"]), &["CPU 99999"]);
    assert_names(&refused(&["bench", "pushpull", "--batch", "0"]), &["--batch"]);
    assert_names(&refused(&["bench", "pushpull", "--batch", "1000000"]), &["1000000", "16384"]);
    assert_names(&refused(&["bench", "pushpull", "--attention", "1000"]), &["--attention"]);
    assert_names(&refused(&["bench", "pushpull", "--microbatches", "65"]), &["--microbatches", "64"]);
    assert_names(&refused(&["bench", "pipeline", "--microbatches", "17"]), &["--microbatches"]);
    assert_names(&refused(&["bench", "pipeline", "--attention-us", "0"]), &["--attention-us"]);
    assert_names(&refused(&["bench", "report"]), &["FILE"]);
    assert_names(&refused(&["bench", "report", "/no/such.json"]), &["/no/such.json"]);
    let nowhere = "/no/such/directory/file";
    assert_names(&bench(&["--provider", "shm", "--json", nowhere]), &[nowhere]);
}

#[test]
fn a_configuration_file_is_read_strictly() {
    let dir = tempfile::tempdir().unwrap();
    let write = |text: &str| {
        let path = dir.path().join("role.toml");
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    for role in ["scheduler", "attention", "ffn", "up"] {
        assert_names(&refused(&[role, "--config", "/no/such.toml"]), &["/no/such.toml"]);
        let path = write("# a comment\nnonsense = 1\n");
        assert_names(
            &refused(&[role, "--config", &path]),
            &["role.toml, line 2", "unknown field `nonsense`", "hint: known fields"],
        );
        let path = write("token = 5\n");
        assert_names(&refused(&[role, "--config", &path]), &["role.toml, line 1", "`token`", "integer"]);
        let path = write("= 5\n");
        assert_names(&refused(&[role, "--config", &path]), &["role.toml, line 1"]);
    }
}

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ffn.toml");
    std::fs::write(&path, "scheduler = \"ftp://from-file\"\njoin_timeout_ms = 100\n").unwrap();
    let path = path.to_str().unwrap();
    assert_names(&refused(&["ffn", "--config", path]), &["from-file"]);
    let mut command = stepmesh(&["ffn", "--config", path]);
    command
        .env("STEPMESH_SCHEDULER", "ftp://from-environment")
        .env("DMLC_PS_ROOT_URI", "from-alias")
        .env("DMLC_PS_ROOT_PORT", "1");
    assert_names(&refuse(2, command), &["from-environment"]);
    let mut command = stepmesh(&["ffn", "--config", path, "--scheduler", "ftp://from-flag"]);
    command.env("STEPMESH_SCHEDULER", "ftp://from-environment");
    assert_names(&refuse(2, command), &["from-flag"]);
    let mut command = stepmesh(&["ffn"]);
    command.env("STEPMESH_LANES", "many");
    assert_names(&refuse(2, command), &["many", "--lanes", "STEPMESH_LANES"]);
}

#[test]
fn an_address_that_others_can_reach_needs_a_token() {
    assert_names(&refused(&["scheduler", "--listen", "0.0.0.0:0"]), &["0.0.0.0:0", "token", "--insecure"]);
    let member = ["attention", "--transport", "tcp", "--address", "0.0.0.0"];
    assert_names(&refused(&member), &["0.0.0.0", "token", "--insecure"]);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    assert_names(&refuse(1, stepmesh(&["scheduler", "--listen", &address])), &[&address, "in use"]);
    assert_names(&refuse(1, stepmesh(&["up", "--listen", &address])), &["scheduler", &address, "in use"]);
    let port = taken.local_addr().unwrap().port().to_string();
    let member = ["ffn", "--transport", "tcp", "--port", &port];
    let said = String::from_utf8(run(&member).stderr).unwrap();
    assert_names(&said, &["error: ", &port]);
}

#[test]
fn slots_beyond_the_memory_limit_are_refused() {
    let up = ["up", "--attention", "1", "--ffn", "1", "--memory-limit-mib", "1", "--max-rows", "4096"];
    let said = refuse(2, stepmesh(&up));
    assert_names(&said, &["limit is 1048576", "bytes of registered memory"]);
}

/// A copy of the carried checkpoint, to be damaged.
fn checkpoint() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture().join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn edit(path: &Path, change: impl Fn(Vec<u8>) -> Vec<u8>) {
    std::fs::write(path, change(std::fs::read(path).unwrap())).unwrap();
}

/// Replaces text by text of the same length.
fn replace(mut bytes: Vec<u8>, old: &str, new: &str) -> Vec<u8> {
    assert_eq!(old.len(), new.len());
    let at = bytes.windows(old.len()).position(|window| window == old.as_bytes()).unwrap();
    bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
    bytes
}

#[test]
fn a_checkpoint_that_is_not_whole_is_refused_before_anything_starts() {
    assert_names(&refused(&["demo", "--checkpoint", "/no/such/model"]), &["/no/such/model/config.json"]);
    assert_names(&refused(&["inspect", "/no/such/model"]), &["/no/such/model/config.json"]);

    let dir = checkpoint();
    let path = dir.path().to_str().unwrap();
    edit(&dir.path().join("model.safetensors"), |bytes| bytes[..bytes.len() / 2].to_vec());
    for command in [&["demo", "--checkpoint", path][..], &["up", "--checkpoint", path], &["inspect", path]] {
        assert_names(&refused(command), &["model.safetensors", "truncated"]);
    }
    edit(&dir.path().join("model.safetensors"), |_| b"\x10\0\0\0\0\0\0\0{\"not json at all".to_vec());
    assert_names(&refused(&["demo", "--checkpoint", path]), &["model.safetensors"]);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert_names(&refused(&["demo", "--checkpoint", path]), &["model.safetensors"]);
}

#[test]
fn a_configuration_of_a_model_that_cannot_be_run_is_refused() {
    let dir = checkpoint();
    let path = dir.path().to_str().unwrap();
    let rope = "\"rope_scaling\": {\"rope_type\": \"yarn\"}";
    edit(&dir.path().join("config.json"), |bytes| {
        String::from_utf8(bytes).unwrap().replace("\"rope_scaling\": null", rope).into_bytes()
    });
    assert_names(&refused(&["demo", "--checkpoint", path]), &["rope_type", "yarn"]);
    edit(&dir.path().join("config.json"), |_| b"{\"hidden_size\": 25".to_vec());
    assert_names(&refused(&["inspect", path]), &["config.json", "JSON"]);
}

#[test]
fn a_missing_tensor_or_a_wrong_shape_ends_the_demo_with_the_tensors_name() {
    let weights = |change: &dyn Fn(Vec<u8>) -> Vec<u8>, names: &[&str]| {
        let dir = checkpoint();
        edit(&dir.path().join("model.safetensors"), change);
        let output = run(&["demo", "--checkpoint", dir.path().to_str().unwrap()]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{said}");
        let last = said.lines().rfind(|line| line.starts_with("error: ")).unwrap_or_default();
        assert_names(last, names);
    };
    let missing = |bytes| replace(bytes, "model.norm.weight", "model.worm.weight");
    weights(&missing, &["model.norm.weight", "missing"]);
    let shape = |bytes| replace(bytes, "[512,256]", "[256,512]");
    weights(&shape, &["shape", "[512, 256]", "[256, 512]"]);
}
