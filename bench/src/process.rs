//! Programs of others: found, run with a deadline, ended when nobody wants them any more.

use crate::BenchError;
use std::ffi::OsString;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The program of that name in `PATH`.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// A program that plays a role in a measurement when more arguments are added to these.
#[derive(Clone, Debug)]
pub struct Program {
    /// The file.
    pub program: PathBuf,
    /// Before those that are added.
    pub arguments: Vec<OsString>,
}

impl Program {
    pub(crate) fn start(&self, arguments: impl IntoIterator<Item = OsString>) -> Result<Process, BenchError> {
        Process::start(Command::new(&self.program).args(&self.arguments).args(arguments))
    }
}

/// A process that ends with this value.
pub(crate) struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts it; what it says on standard output can be had at its end.
    pub(crate) fn start(command: &mut Command) -> Result<Self, BenchError> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.map_err(|error| BenchError::Peer { peer: name.clone(), reason: error.to_string() })?;
        Ok(Self { child, name })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end; what it said on standard output if it ended well. It must not say more than a pipe holds.
    pub(crate) fn finish(mut self, deadline: Instant) -> Result<String, BenchError> {
        // Seldom, as what it measures would feel it.
        let mut pause = Duration::from_millis(5);
        let failed = |reason| BenchError::Peer { peer: self.name.clone(), reason };
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() >= deadline => return Err(failed("it did not end in time".into())),
                Ok(None) => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(80));
                }
                Err(error) => return Err(failed(error.to_string())),
            }
        };
        let (mut said, mut complaint) = (String::new(), String::new());
        let read = |stream: Option<&mut dyn Read>, text: &mut String| stream.map(|stream| stream.read_to_string(text));
        let _ = read(self.child.stdout.as_mut().map(|stream| stream as _), &mut said);
        let _ = read(self.child.stderr.as_mut().map(|stream| stream as _), &mut complaint);
        if status.success() {
            return Ok(said);
        }
        let last = complaint.lines().chain(said.lines()).rfind(|line| !line.trim().is_empty());
        Err(failed(last.map_or_else(|| status.to_string(), |line| line.trim().to_owned())))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port of loopback on which nobody listens.
pub(crate) fn free_port() -> Result<u16, BenchError> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    Ok(port.map_err(BenchError::system("looking for a free port"))?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_says_comes_back_and_how_it_failed_too() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            Process::start(&mut command)
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        assert_eq!(shell("echo hello").and_then(|process| process.finish(deadline)).ok().as_deref(), Some("hello\n"));
        let error = shell("echo sorry >&2; exit 3").and_then(|process| process.finish(deadline)).err();
        assert!(error.is_some_and(|error| error.to_string().contains("sorry")));
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let sleep = Process::start(Command::new("sleep").arg("1000")).ok();
        let error = sleep.and_then(|process| process.finish(Instant::now()).err());
        assert!(error.is_some_and(|error| error.to_string().contains("in time")));
    }
}
