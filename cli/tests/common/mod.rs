//! Runs the `stepmesh` command and looks at the processes that it starts.

#![allow(dead_code, unreachable_pub)]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Longer than anything takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The command, in an environment that says nothing.
pub fn stepmesh(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stepmesh"));
    for (name, _) in std::env::vars() {
        if name.starts_with("STEPMESH_") || name.starts_with("DMLC_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub fn run(arguments: &[&str]) -> Output {
    stepmesh(arguments).output().unwrap()
}

/// Runs it to its end, which must be an error with this code; returns what it said.
pub fn refuse(code: i32, mut command: Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
    assert!(said.contains("error: ") && !said.contains("panicked"), "{command:?}: {said}");
    said
}

pub fn fixture() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/step3-tiny"))
}

/// A command that runs on, and the lines of its standard output and error.
pub struct Running {
    pub child: Child,
    pub out: Receiver<String>,
    pub err: Receiver<String>,
}

pub fn start(mut command: Command) -> Running {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let out = lines(child.stdout.take().unwrap());
    let err = lines(child.stderr.take().unwrap());
    Running { child, out, err }
}

fn lines(stream: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The first line of standard output from here on that `wanted` wants.
    pub fn wait_for(&self, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.out.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if wanted(&line) => return line,
                Ok(_) => {}
                Err(_) => panic!("no such line; it said: {}", self.rest_of_errors()),
            }
        }
    }

    /// Waits for the end: exit code, and how long it took.
    pub fn wait(&mut self) -> (Option<i32>, Duration) {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), started.elapsed());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("it does not end; it said: {}", self.rest_of_errors());
    }

    /// What standard error still holds.
    pub fn rest_of_errors(&self) -> String {
        let mut text = String::new();
        while let Ok(line) = self.err.recv_timeout(Duration::from_millis(200)) {
            text.push_str(&line);
            text.push('\n');
        }
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that was started by a command under test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    /// Its first argument.
    pub role: String,
}

/// The children of `parent`.
pub fn children(parent: u32) -> Vec<Process> {
    let pids =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| stat(*pid).is_some_and(|fields| fields[1] == parent.to_string()))
        .map(|pid: u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let role = line.split(|byte| *byte == 0).nth(1).unwrap_or_default();
            Process { pid, role: String::from_utf8_lossy(role).into_owned() }
        })
        .collect()
}

/// A process's state, parent, and so on: `/proc/<pid>/stat` from its third field on.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    Some(fields.split(' ').map(str::to_owned).collect())
}

/// Whether the process is gone, not even waiting to be reaped.
pub fn is_gone(pid: u32) -> bool {
    stat(pid).is_none()
}

/// Whether the process runs no more; whoever adopted it may not have reaped it.
pub fn has_ended(pid: u32) -> bool {
    stat(pid).is_none_or(|fields| fields[0] == "Z" || fields[0] == "X")
}

/// User and system time of a process so far, in clock ticks.
pub fn cpu_ticks(pid: u32) -> u64 {
    stat(pid).map_or(0, |fields| fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap())
}

/// Whether `holds` comes true within `limit`.
pub fn within(limit: Duration, holds: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !holds() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

pub fn signal(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}
