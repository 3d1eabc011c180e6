//! A doomed peer in a process of its own: the test binary runs itself again, with one test that serves.
//!
//! The two talk in lines: commands on the child's standard input, answers on its standard output behind a mark, since
//! the test runner prints there too.

use super::DoomedPeer;
use crate::{Access, Completion, Descriptor, Device, LinkId, LinkSecret, LinkSpec, Side};
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, TryRecvError};
use std::time::Duration;

const VARIABLE: &str = "STEPMESH_CONFORMANCE_CHILD";
const MARK: &str = "@child ";

/// The parent's hold on a child; killed when dropped.
pub struct ChildPeer {
    process: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

/// Starts the running test binary again, with the test of this (full) name only, which must call [`serve`].
pub fn spawn(test: &str) -> ChildPeer {
    let mut process = Command::new(std::env::current_exe().expect("the test binary's path"))
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(VARIABLE, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starting the test binary");
    let commands = process.stdin.take().expect("piped");
    let answers = BufReader::new(process.stdout.take().expect("piped")).lines();
    ChildPeer { process, commands, answers }
}

impl ChildPeer {
    fn ask(&mut self, command: &str) -> Vec<u8> {
        writeln!(self.commands, "{command}").expect("the child takes commands");
        loop {
            let line = self.answers.next().expect("the child answers").expect("text");
            if let Some((_, answer)) = line.split_once(MARK) {
                return from_hex(answer);
            }
        }
    }
}

impl DoomedPeer for ChildPeer {
    fn connect(&mut self, spec: LinkSpec, peer: &[u8]) -> Descriptor {
        assert_eq!(spec.side, Side::Passive, "a child is dialled");
        let (secret, peer) = (to_hex(&spec.secret.0), to_hex(peer));
        self.ask(&format!("connect {} {} {secret} {peer}", spec.incarnation, spec.lanes))
    }

    fn grant(&mut self, len: usize) -> Descriptor {
        self.ask(&format!("grant {len}"))
    }

    fn kill(&mut self) {
        self.process.kill().expect("killing the child");
    }
}

impl Drop for ChildPeer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The child's life: obeys its parent until it is killed, or until the parent is gone. In a process that [`spawn`] did
/// not start it does nothing, so that the test it stands in passes.
pub fn serve(device: impl FnOnce() -> Arc<dyn Device>) {
    if std::env::var_os(VARIABLE).is_none() {
        return;
    }
    let device = device();
    let mut endpoint = device.endpoint().expect("endpoint");
    let (sender, commands) = mpsc::channel();
    let waker = endpoint.waker();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
            waker.wake();
        }
    });
    let mut link = LinkId(0);
    let mut connected = false;
    let mut grant = None;
    let mut seen = Vec::new();
    loop {
        match commands.try_recv() {
            Ok(line) => {
                let words: Vec<_> = line.split(' ').collect();
                match words[..] {
                    ["connect", incarnation, lanes, secret, peer] => {
                        let spec = LinkSpec {
                            incarnation: incarnation.parse().expect("a number"),
                            lanes: lanes.parse().expect("a number"),
                            secret: LinkSecret(from_hex(secret).try_into().expect("16 bytes")),
                            side: Side::Passive,
                        };
                        let (id, descriptor) = endpoint.open(spec).expect("open");
                        endpoint.connect(id, &from_hex(peer), Duration::from_secs(10)).expect("connect");
                        link = id;
                        answer(&descriptor);
                    }
                    ["grant", len] => grant = Some(len.parse().expect("a number")),
                    _ => panic!("not a command: {line}"),
                }
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return,
        }
        endpoint.poll(&mut seen).expect("poll");
        connected |= seen.drain(..).any(|completion| completion == Completion::Connected { link });
        if let (true, Some(len)) = (connected, grant) {
            let region = device.allocate(len, Access::PeerWrite, None).expect("allocate");
            answer(&endpoint.grant(link, &region, Access::PeerWrite).expect("grant"));
            grant = None;
        }
        endpoint.wait(Duration::from_millis(1)).expect("wait");
    }
}

fn answer(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{MARK}{}", to_hex(bytes)).and_then(|()| out.flush()).expect("the parent listens");
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits = |i| u8::from_str_radix(&text[i..i + 2], 16).expect("hexadecimal digits");
    (0..text.len()).step_by(2).map(digits).collect()
}
