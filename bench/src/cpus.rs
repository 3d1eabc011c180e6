//! Two threads pinned to two of the machine's CPUs.

use crate::BenchError;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The CPUs of the two ends.
#[derive(Clone, Copy, Debug)]
pub struct Cpus([usize; 2]);

impl Cpus {
    /// Those that are wanted, or the first two that this process may use.
    ///
    /// # Errors
    /// There are fewer than two, or those that are wanted are not for this process, or are one.
    pub fn choose(wanted: Option<[usize; 2]>) -> Result<Self, BenchError> {
        let allowed = allowed();
        match (wanted, allowed.as_slice()) {
            (Some([a, b]), _) if a == b => Err(BenchError::SameCpu(a)),
            (Some(wanted), allowed) => match wanted.iter().find(|cpu| !allowed.contains(cpu)) {
                Some(&cpu) => Err(BenchError::NoCpu { cpu, allowed: allowed.to_vec() }),
                None => Ok(Self(wanted)),
            },
            (None, &[first, second, ..]) => Ok(Self([first, second])),
            (None, few) => Err(BenchError::Cpus(few.len())),
        }
    }

    pub(crate) fn list(self) -> [usize; 2] {
        self.0
    }

    /// Runs the two ends, each pinned to its CPU, to their end. Each is given a flag that says that the other has left.
    pub(crate) fn duel<A: Send, B: Send>(
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
    pin(cpu)?;
    end(over)
}

/// Keeps the calling thread on one CPU.
pub(crate) fn pin(cpu: usize) -> Result<(), BenchError> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(BenchError::system("pinning a thread"))
}

/// Tells the other end, also when this one panics.
struct Leaves<'a>(&'a AtomicBool);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Those that this process may use.
pub(crate) fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(None).unwrap_or_default();
    (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

/// CPU time of the calling thread.
pub(crate) fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// CPU time of the calling thread and of all threads of the process that are named `and`.
pub(crate) fn thread_seconds(and: &str) -> f64 {
    let is_named = |task: &Path| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == and);
    let others = tasks("self").filter(|task| is_named(task)).filter_map(|task| task_time(&task));
    (thread_time() + others.sum::<Duration>()).as_secs_f64()
}

/// CPU time of all threads of a process that there are now.
pub(crate) fn process_time(id: u32) -> Duration {
    tasks(&id.to_string()).filter_map(|task| task_time(&task)).sum()
}

fn tasks(process: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let tasks = fs::read_dir(format!("/proc/{process}/task"));
    tasks.into_iter().flatten().flatten().map(|task| task.path())
}

fn task_time(task: &Path) -> Option<Duration> {
    // Nanoseconds on a CPU, nanoseconds waiting for one, time slices.
    let running = fs::read_to_string(task.join("schedstat")).ok()?;
    running.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}
