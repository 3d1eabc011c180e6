//! libfabric, by its own `fi_pingpong`: reliable datagrams, whose receiver is told by a completion.
//!
//! It reports the mean of half a round trip, counted twice here.

use crate::process::{Process, find, free_port};
use crate::{BenchError, Cpus};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use stepmesh_transport::Provider;

const PROGRAM: &str = "fi_pingpong";
/// Round trips from which the length of a run is reckoned.
const TRIAL: u64 = 200;
/// How long one run may take beyond its measuring.
const PATIENCE: Duration = Duration::from_secs(20);

/// An installed libfabric.
#[derive(Clone, Debug)]
pub struct Libfabric {
    program: PathBuf,
    /// Of the library.
    pub version: String,
}

impl Libfabric {
    /// The one that is installed, with its tools (Debian's `libfabric-bin`).
    pub fn find() -> Option<Self> {
        let program = find(PROGRAM)?;
        let info = Command::new("fi_info").arg("--version").output().ok()?;
        let info = String::from_utf8_lossy(&info.stdout);
        let version = info.lines().find_map(|line| Some(line.strip_prefix("libfabric:")?.trim().to_owned()));
        Some(Self { program, version: version.unwrap_or_default() })
    }

    /// Whether it has a transport for the same purpose.
    pub fn speaks(provider: Provider) -> bool {
        matches!(provider, Provider::Shm | Provider::Tcp)
    }

    /// The mean round trip of `bytes` each way, over about `budget`.
    pub(crate) fn round_trip_us(
        &self,
        provider: Provider,
        bytes: usize,
        cpus: Cpus,
        budget: Duration,
    ) -> Result<f64, BenchError> {
        let trial = self.run(provider, bytes, cpus, TRIAL)?;
        let count = budget.as_secs_f64() * 1e6 / trial.max(0.01);
        self.run(provider, bytes, cpus, (count as u64).clamp(TRIAL, 5_000_000))
    }

    fn run(&self, provider: Provider, bytes: usize, cpus: Cpus, count: u64) -> Result<f64, BenchError> {
        let port = free_port()?.to_string();
        let deadline = Instant::now() + PATIENCE;
        let start = |last: &[&str]| {
            let mut command = Command::new(&self.program);
            // Of `tcp`, what makes reliable datagrams of streams.
            let name = if provider == Provider::Shm { "shm" } else { "tcp;ofi_rxm" };
            command.args(["-p", name, "-e", "rdm", "-S", &bytes.to_string(), "-I", &count.to_string()]);
            Process::start(command.args(last))
        };
        // A process runs where the thread that starts it does.
        let (said, ()) = cpus.duel(
            |server_is_gone| {
                // The server says nothing until it has a client; one that comes too early is refused.
                loop {
                    match start(&["-P", &port, "127.0.0.1"])?.finish(deadline) {
                        Ok(said) => return Ok(said),
                        Err(error) if Instant::now() >= deadline => return Err(error),
                        Err(error) if server_is_gone.load(std::sync::atomic::Ordering::Acquire) => return Err(error),
                        Err(_) => std::thread::sleep(Duration::from_millis(20)),
                    }
                }
            },
            |_| start(&["-B", &port])?.finish(deadline).map(drop),
        )?;
        mean_one_way_us(&said).map(|one_way| 2.0 * one_way)
    }
}

/// The column `usec/xfer` of the last line: bytes, sent, acknowledged, total, time, MB/s, µs, millions a second.
fn mean_one_way_us(said: &str) -> Result<f64, BenchError> {
    let line = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    let mean = line.split_whitespace().nth(6).and_then(|mean| mean.parse::<f64>().ok());
    mean.filter(|mean| *mean > 0.0).ok_or_else(|| BenchError::Peer {
        peer: PROGRAM.into(),
        reason: format!("no figures in what it says: {}", said.trim()),
    })
}

#[cfg(test)]
mod tests {
    use super::mean_one_way_us;

    #[test]
    fn the_mean_is_read_from_the_table() {
        let said = "bytes   #sent   #ack     total       time     MB/sec    usec/xfer   Mxfers/sec\n\
                    64      10k     =10k     1.2m        0.04s     34.18       1.87       0.53\n";
        assert_eq!(mean_one_way_us(said).ok(), Some(1.87));
        assert!(mean_one_way_us("bytes #sent\n").is_err() && mean_one_way_us("").is_err());
    }
}
