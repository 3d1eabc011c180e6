//! Where it runs: the machine in words, and two threads pinned to two of its CPUs.

use super::BenchError;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

/// The machine, as the report names it.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's own name.
    pub cpu: String,
    /// CPUs that the process may use.
    pub cpus: usize,
    /// The CPUs that the two ends were pinned to.
    pub pinned: [usize; 2],
    /// Its release.
    pub kernel: String,
    /// The load averages over 1, 5 and 15 minutes when the run ended: what else was running.
    pub load: [f64; 3],
}

impl Machine {
    pub(super) fn describe(cpus: Cpus) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let mut load = [0.0; 3];
        for (average, word) in load.iter_mut().zip(read("/proc/loadavg").split(' ')) {
            *average = word.parse().unwrap_or_default();
        }
        Self {
            cpu: cpu.map_or(std::env::consts::ARCH, |(_, name)| name).to_owned(),
            cpus: allowed().len(),
            pinned: cpus.0,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load,
        }
    }
}

/// The CPUs of the two ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cpus([usize; 2]);

impl Cpus {
    pub(super) fn choose(wanted: Option<[usize; 2]>) -> Result<Self, BenchError> {
        let allowed = allowed();
        match (wanted, allowed.as_slice()) {
            (Some(wanted), _) => Ok(Self(wanted)),
            (None, &[first, second, ..]) => Ok(Self([first, second])),
            (None, few) => Err(BenchError::Cpus(few.len())),
        }
    }

    /// Runs the two ends, each pinned to its CPU, to their end. Each is given a flag that says that the other has left.
    pub(super) fn duel<A: Send, B: Send>(
        self,
        a: impl FnOnce(&AtomicBool) -> Result<A, BenchError> + Send,
        b: impl FnOnce(&AtomicBool) -> Result<B, BenchError> + Send,
    ) -> Result<(A, B), BenchError> {
        let over = AtomicBool::new(false);
        let over = &over;
        let (a, b) = std::thread::scope(|scope| {
            let a = scope.spawn(move || at(self.0[0], over, a));
            let b = scope.spawn(move || at(self.0[1], over, b));
            (a.join().unwrap_or(Err(BenchError::Thread)), b.join().unwrap_or(Err(BenchError::Thread)))
        });
        match (a, b) {
            (Ok(a), Ok(b)) => Ok((a, b)),
            (Err(BenchError::Stopped), Err(error)) | (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }
}

fn at<T>(
    cpu: usize,
    over: &AtomicBool,
    end: impl FnOnce(&AtomicBool) -> Result<T, BenchError>,
) -> Result<T, BenchError> {
    let _leaves = Leaves(over);
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(BenchError::system("pinning a thread"))?;
    end(over)
}

/// Tells the other end, also when this one panics.
struct Leaves<'a>(&'a AtomicBool);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(None).unwrap_or_default();
    (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}
