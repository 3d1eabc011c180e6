//! UCX, by its own `ucx_perftest`: raw puts, active messages and tagged messages, polled by both sides.
//!
//! It reports half of a round trip; here it is counted twice. Both of its processes are pinned to the CPUs that our ends
//! are pinned to, and it runs as many round trips as take as long as ours.

use crate::BenchError;
use crate::cpus::Cpus;
use crate::process::{Process, find, free_port};
use crate::timing::Statistic;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use stepmesh_transport::Provider;

const PROGRAM: &str = "ucx_perftest";
/// Round trips from which the length of a run is reckoned.
const TRIAL: u64 = 200;
/// How long one run may take beyond its measuring.
const PATIENCE: Duration = Duration::from_secs(20);

/// What of UCX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UcxTest {
    /// One-sided: the receiver polls the memory that the last byte lands in.
    Put,
    /// Active messages.
    ActiveMessage,
    /// Tagged messages.
    Tag,
}

impl UcxTest {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Put, Self::ActiveMessage, Self::Tag];

    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Put => "ucx_put",
            Self::ActiveMessage => "ucx_am",
            Self::Tag => "ucx_tag",
        }
    }

    fn argument(self) -> &'static str {
        match self {
            Self::Put => "ucp_put_lat",
            Self::ActiveMessage => "ucp_am_lat",
            Self::Tag => "tag_lat",
        }
    }
}

/// An installed UCX.
#[derive(Clone, Debug)]
pub struct Ucx {
    program: PathBuf,
    /// Of the library.
    pub version: String,
}

impl Ucx {
    /// The one that is installed, with its tools (Debian's `ucx-utils`).
    pub fn find() -> Option<Self> {
        let program = find(PROGRAM)?;
        let info = Command::new("ucx_info").arg("-v").output().ok()?;
        let info = String::from_utf8_lossy(&info.stdout);
        let version =
            info.lines().find_map(|line| Some(line.split_once("ersion")?.1.trim_matches([':', ' ']).to_owned()));
        Some(Self { program, version: version.unwrap_or_default() })
    }

    /// Whether it has a transport for the same purpose.
    pub fn speaks(provider: Provider) -> bool {
        matches!(provider, Provider::Shm | Provider::Tcp)
    }

    /// What its round trips are told by. Its medians are of single rounds of the last 2048, in steps of the time-stamp counter: 10 ns
    /// where that counts a hundred million times a second, a tenth of a round over shared memory.
    pub(crate) fn statistic(provider: Provider) -> Statistic {
        if provider == Provider::Shm { Statistic::Mean } else { Statistic::Median }
    }

    /// The round trip of `bytes` each way, over about `budget`.
    pub(crate) fn round_trip_us(
        &self,
        test: UcxTest,
        provider: Provider,
        bytes: usize,
        cpus: Cpus,
        budget: Duration,
    ) -> Result<f64, BenchError> {
        let trial = self.run(test, provider, bytes, cpus, TRIAL)?;
        let count = budget.as_secs_f64() * 1e6 / trial.max(0.01);
        self.run(test, provider, bytes, cpus, (count as u64).clamp(TRIAL, 5_000_000))
    }

    fn run(&self, test: UcxTest, provider: Provider, bytes: usize, cpus: Cpus, count: u64) -> Result<f64, BenchError> {
        let port = free_port()?;
        let [client, server] = cpus.list();
        let command = |cpu: usize| {
            let mut command = Command::new(&self.program);
            match provider {
                Provider::Shm => command.env("UCX_TLS", "posix,cma,self"),
                _ => command.env("UCX_TLS", "tcp").env("UCX_NET_DEVICES", "lo"),
            };
            command.env("UCX_WARN_UNUSED_ENV_VARS", "n").args(["-p", &port.to_string(), "-c", &cpu.to_string()]);
            command
        };
        let deadline = Instant::now() + PATIENCE;
        let _server = Process::start(&mut command(server))?;
        let mut client = command(client);
        client.arg("127.0.0.1").args(["-t", test.argument(), "-s", &bytes.to_string(), "-f", "-v"]);
        client.args(["-n", &count.to_string(), "-w", &(count / 10).to_string()]);
        // The server says when it listens, but not before its buffer is full: until then the client is refused.
        loop {
            match Process::start(&mut client)?.finish(deadline) {
                Ok(said) => return one_way_us(&said, Self::statistic(provider)).map(|one_way| 2.0 * one_way),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

/// The second column of the line after the head of the CSV, or the fourth: the mean of all.
fn one_way_us(said: &str, statistic: Statistic) -> Result<f64, BenchError> {
    let column = match statistic {
        Statistic::Median => 1,
        Statistic::Mean => 3,
    };
    let line = said.lines().skip_while(|line| !line.starts_with("iterations,")).nth(1);
    let one_way = line.and_then(|line| line.split(',').nth(column)).and_then(|one_way| one_way.trim().parse().ok());
    one_way.filter(|one_way| *one_way > 0.0).ok_or_else(|| BenchError::Peer {
        peer: PROGRAM.into(),
        reason: format!("no round trip in what it says: {}", said.trim()),
    })
}

#[cfg(test)]
mod tests {
    use super::{Statistic, one_way_us};

    #[test]
    fn the_median_and_the_mean_are_read_from_the_csv() {
        let said = "iterations,50.0_percentile_lat,avg_lat,overall_lat\n100000,0.165,10.730,0.171\n";
        assert_eq!(one_way_us(said, Statistic::Median).ok(), Some(0.165));
        assert_eq!(one_way_us(said, Statistic::Mean).ok(), Some(0.171));
        assert!(one_way_us("iterations,50.0_percentile_lat\n100000\n", Statistic::Median).is_err());
        assert!(one_way_us("", Statistic::Mean).is_err());
    }
}
