//! perftest, the floor of RDMA: the same movement by the barest use of libibverbs there is.
//!
//! `ib_write_lat` bounces plain writes, of which both sides poll the memory; `ib_send_lat` bounces messages that complete
//! at the receiver, as writes-with-immediate do; `ib_write_bw` streams plain writes, and the receiver does nothing. They
//! run as two processes, between the same devices and on the same CPUs as our two ends. perftest reports half of a round
//! trip; here it is counted twice.

use crate::process::{Process, find, free_port};
use crate::timing::Timing;
use crate::{BenchError, Cpus};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long one run may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether the server listens.
const SOON: Duration = Duration::from_millis(20);
/// How often it is looked whether the client is done: seldom, as what it measures would feel it.
const SELDOM: Duration = Duration::from_millis(80);

/// See the module.
pub(crate) struct Perftest<'a> {
    devices: &'a [String; 2],
    cpus: Cpus,
}

/// The programs of it that are used here.
const PROGRAMS: [&str; 3] = ["ib_write_lat", "ib_send_lat", "ib_write_bw"];

impl Perftest<'_> {
    /// Whether it is there.
    pub(crate) fn is_installed() -> bool {
        PROGRAMS.iter().all(|program| find(program).is_some())
    }
}

impl<'a> Perftest<'a> {
    /// Between two devices, each end on its CPU.
    pub(crate) fn new(devices: &'a [String; 2], cpus: Cpus) -> Result<Self, BenchError> {
        for program in PROGRAMS {
            find(program).ok_or_else(|| BenchError::Peer {
                peer: program.into(),
                reason: "not found; the floor of RDMA is taken by perftest (Debian: perftest)".into(),
            })?;
        }
        Ok(Self { devices, cpus })
    }

    /// So many round trips of `bytes` each way, by `ib_write_lat` or `ib_send_lat`.
    pub(crate) fn round_trips(&self, program: &'static str, bytes: usize, count: u64) -> Result<Timing, BenchError> {
        let said = self.run(program, bytes, count, &[])?;
        round_trip(&said).ok_or_else(|| odd(program, &said))
    }

    /// 10⁹ bytes a second of so many plain writes one after the other, of both directions together.
    pub(crate) fn stream(&self, bytes: usize, both: bool, count: u64) -> Result<f64, BenchError> {
        const PROGRAM: &str = "ib_write_bw";
        let said = self.run(PROGRAM, bytes, count, if both { &["-b"] } else { &[] })?;
        bandwidth(&said).ok_or_else(|| odd(PROGRAM, &said))
    }

    fn run(&self, program: &'static str, bytes: usize, count: u64, options: &[&str]) -> Result<String, BenchError> {
        let port = free_port()?;
        let deadline = Instant::now() + PATIENCE;
        let start = |device: &str, server: Option<&str>| {
            let mut command = Command::new(program);
            command.args(["-F", "-d", device, "-p", &port.to_string(), "-s", &bytes.to_string()]);
            command.args(["-n", &count.to_string()]).args(options).args(server);
            Process::start(&mut command)
        };
        let [of_client, of_server] = self.devices;
        let has_ended = AtomicBool::new(false);
        // A process runs where the thread that starts it does.
        let (said, ()) = self.cpus.duel(
            |server_is_gone| {
                let said = await_listener(port, deadline, server_is_gone)
                    .and_then(|()| start(of_client, Some("127.0.0.1"))?.finish(deadline));
                has_ended.store(true, Ordering::Release);
                said
            },
            |_| {
                let mut server = start(of_server, None)?;
                while !has_ended.load(Ordering::Acquire) && server.is_running() {
                    std::thread::sleep(SELDOM);
                }
                // Without its client it would wait for ever, so it has little time left.
                server.finish(Instant::now() + Duration::from_secs(5)).map(drop)
            },
        )?;
        Ok(said)
    }
}

/// Waits until somebody listens on a port. A connection would be taken for the client's.
fn await_listener(port: u16, deadline: Instant, server_is_gone: &AtomicBool) -> Result<(), BenchError> {
    const LISTENS: &str = "0A";
    let port = format!(":{port:04X}");
    let listens = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some(LISTENS)
    };
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    while !tables.iter().any(|table| std::fs::read_to_string(table).unwrap_or_default().lines().any(listens)) {
        if server_is_gone.load(Ordering::Acquire) || Instant::now() >= deadline {
            return Err(BenchError::Stopped);
        }
        std::thread::sleep(SOON);
    }
    Ok(())
}

/// From bytes, iterations, and half the minimum, maximum, median, mean, deviation, 99th and 99.9th percentile.
fn round_trip(said: &str) -> Option<Timing> {
    match last_figures(said)[..] {
        [_, _, _, _, median, mean, _, p99, _] if median > 0.0 => {
            Some(Timing { p50_us: 2.0 * median, p99_us: 2.0 * p99, mean_us: 2.0 * mean })
        }
        _ => None,
    }
}

/// From bytes, iterations, peak and mean in 2²⁰ bytes a second (it says MB), and messages.
fn bandwidth(said: &str) -> Option<f64> {
    match last_figures(said)[..] {
        [_, _, _, mean, _] if mean > 0.0 => Some(mean * f64::from(1 << 20) / 1e9),
        _ => None,
    }
}

/// The last line that consists of figures.
fn last_figures(said: &str) -> Vec<f64> {
    let figures = |line: &str| line.split_whitespace().map(|word| word.parse().ok()).collect::<Option<Vec<f64>>>();
    said.lines().rev().filter_map(figures).find(|figures| figures.len() > 1).unwrap_or_default()
}

fn odd(program: &str, said: &str) -> BenchError {
    BenchError::Peer { peer: program.into(), reason: format!("no figures in what it says: {}", said.trim()) }
}

#[cfg(test)]
mod tests {
    use super::{bandwidth, round_trip};

    const LATENCY: &str = "\
---------------------------------------------------------------------------------------
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 8       2000          34.28          178.33       36.68    \t       40.02       \t12.74  \t\t115.15  \t\t172.45
---------------------------------------------------------------------------------------
";
    const BANDWIDTH: &str = "\
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      200              43.25              31.25  \t\t   0.000500
";

    #[test]
    fn half_a_round_trip_is_counted_twice() {
        let timing = round_trip(LATENCY).expect("figures");
        assert_eq!((timing.p50_us, timing.p99_us), (73.36, 230.3));
        assert!(round_trip(BANDWIDTH).is_none() && round_trip("").is_none());
    }

    #[test]
    fn its_megabytes_are_powers_of_two() {
        assert_eq!(bandwidth(BANDWIDTH), Some(0.032768));
        assert!(bandwidth(LATENCY).is_none());
    }
}
