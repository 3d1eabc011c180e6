//! `up` serves `generate`, withstands strangers, and costs nothing while nobody asks.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Running, children, cpu_ticks, fixture, is_gone, refuse, signal, start, stepmesh};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// A deployment that takes requests, and its scheduler's URL.
fn up(arguments: &[&str]) -> (Running, String) {
    let checkpoint = fixture();
    let mut all = vec!["up", "--checkpoint", checkpoint.to_str().unwrap()];
    all.extend(arguments);
    let up = start(stepmesh(&all));
    let line = up.wait_for(|_| true);
    let url = line.strip_prefix("ready ").unwrap_or_else(|| panic!("{line}")).to_owned();
    (up, url)
}

fn generate(url: &str, arguments: &[&str]) -> String {
    let mut command = stepmesh(&["generate", "--scheduler", url]);
    let output = command.args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

const FIRST_GOLDEN: &str = "302 73 274 341 99 285 367 225";

#[test]
fn a_deployment_serves_requests_until_it_is_told_to_stop() {
    let (mut up, url) = up(&["--transport", "tcp"]);
    let processes = children(up.pid());
    let said = generate(&url, &["--token-ids", "0,5,17,300,42", "--token-ids", "0", "--max-new-tokens", "8"]);
    assert!(said.starts_with("#0 [0 5 17 300 42] → 302 73 274 341 99 285 367 225\n#1 [0] → 389 37"), "{said}");

    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("tokens.json");
    generate(&url, &["--token-ids", "0,5", "--max-new-tokens", "2", "--json", json.to_str().unwrap()]);
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(report["sequences"][0]["tokens"].as_array().unwrap().len(), 2);

    let refused = [
        (["--token-ids", "512", "--max-new-tokens", "1"], "512"),
        (["--token-ids", "0", "--max-new-tokens", "1024"], "1024"),
    ];
    for (arguments, named) in refused {
        let mut command = stepmesh(&["generate", "--scheduler", &url]);
        command.args(arguments);
        let said = refuse(2, command);
        assert!(said.contains(named), "{said}");
    }

    signal(up.pid(), "-TERM");
    assert_eq!(up.wait().0, Some(0), "{}", up.rest_of_errors());
    assert!(processes.iter().all(|process| is_gone(process.pid)));
    assert!(up.out.recv().is_err(), "more than one line on standard output");
    let gone = refuse(1, {
        let mut command = stepmesh(&["generate", "--scheduler", &url, "--token-ids", "0"]);
        command.env("RUST_BACKTRACE", "1");
        command
    });
    assert!(gone.contains(&url), "{gone}");
}

#[test]
fn a_daemon_that_dies_ends_the_deployment_by_name() {
    let (mut up, _) = up(&[]);
    let victim = children(up.pid()).into_iter().find(|process| process.role == "ffn").unwrap();
    signal(victim.pid, "-KILL");
    let (code, took) = up.wait();
    let said = up.rest_of_errors();
    assert_eq!(code, Some(1), "{said}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(said.contains(&format!("(pid {}) was killed by signal 9", victim.pid)), "{said}");
}

#[test]
fn only_those_who_know_the_token_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "open-sesame\n").unwrap();
    let file = file.to_str().unwrap();
    let (up, url) = up(&["--token-file", file, "--attention", "1", "--ffn", "1"]);
    for process in children(up.pid()) {
        let line = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap();
        assert!(!String::from_utf8_lossy(&line).contains("open-sesame"), "the token is in the process list");
    }
    generate(&url, &["--token-ids", "0", "--max-new-tokens", "1", "--token-file", file]);
    let ask = |token: Option<&str>| {
        let mut command = stepmesh(&["generate", "--scheduler", &url, "--token-ids", "0"]);
        token.map(|token| command.env("STEPMESH_TOKEN", token));
        refuse(2, command)
    };
    assert!(ask(None).contains("token"));
    let said = ask(Some("open-barley"));
    assert!(said.contains("token is wrong") && !said.contains("barley"), "{said}");
    let mut stranger = stepmesh(&["ffn", "--scheduler", &url]);
    stranger.env("STEPMESH_TOKEN", "open-barley");
    assert!(refuse(2, stranger).contains("token is wrong"));
}

#[test]
fn garbage_on_any_port_disturbs_nobody() {
    let (up, url) = up(&["--transport", "tcp"]);
    let ports: BTreeSet<u16> = children(up.pid()).iter().flat_map(|process| listening_ports(process.pid)).collect();
    assert!(ports.len() >= 3, "a scheduler and the listening ends of links: {ports:?}");
    let mut noise: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for port in &ports {
        for text in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &noise, b""] {
            let mut stream = TcpStream::connect(("127.0.0.1", *port)).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let _ = stream.write_all(text);
            let _ = stream.read(&mut [0; 64]);
        }
        noise.rotate_left(1);
    }
    let said = generate(&url, &["--token-ids", "0,5,17,300,42", "--max-new-tokens", "8"]);
    assert!(said.contains(FIRST_GOLDEN), "{said}");
    assert_eq!(children(up.pid()).len(), 5);
}

/// The TCP ports that a process listens on.
fn listening_ports(pid: u32) -> Vec<u16> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let names = links.filter_map(|link| std::fs::read_link(link.path()).ok()?.into_os_string().into_string().ok());
    let sockets: BTreeSet<String> =
        names.filter_map(|name| Some(name.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect();
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap();
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[3] == "0A" && sockets.contains(row[9]))
        .map(|row| u16::from_str_radix(row[1].rsplit(':').next().unwrap(), 16).unwrap())
        .collect()
}

#[test]
fn an_idle_deployment_uses_less_than_a_fiftieth_of_a_core() {
    for transport in ["shm", "tcp"] {
        let (up, url) = up(&["--transport", transport]);
        generate(&url, &["--token-ids", "0", "--max-new-tokens", "4"]);
        std::thread::sleep(Duration::from_millis(500));
        let processes: Vec<u32> = children(up.pid()).iter().map(|process| process.pid).chain([up.pid()]).collect();
        let ticks = || processes.iter().map(|pid| cpu_ticks(*pid)).sum::<u64>();
        let before = ticks();
        std::thread::sleep(Duration::from_secs(5));
        // A tick is a hundredth of a second: 5 s hold 500 of them.
        let share = (ticks() - before) as f64 / 500.0;
        assert!(share < 0.02, "{:.1} % of a core over {transport}", share * 100.0);
    }
}
