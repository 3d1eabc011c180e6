//! Executors on threads of their own, by the machine's clock.

use super::board::Board;
use super::stages::sleeps;
use crate::cpus::pin;
use crate::{BenchError, Cpus, Scheduling};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use stepmesh_pipeline::{AttentionExecutor, FfnExecutor};

/// How long a wait may keep a thread from seeing that it is to end.
pub(super) const NAP: Duration = Duration::from_millis(10);

/// Both sides at work until dropped.
pub(super) struct Threads {
    stop: Arc<AtomicBool>,
    board: Board,
    threads: Vec<JoinHandle<Result<(), BenchError>>>,
}

impl Threads {
    /// The FFN side is in another process where `serves` is none.
    pub(super) fn start(
        cpus: Cpus,
        board: &Board,
        mut attends: AttentionExecutor,
        serves: Option<FfnExecutor>,
    ) -> Result<Self, BenchError> {
        let [first, second] = cpus.list();
        let mut threads = Self { stop: Arc::default(), board: board.clone(), threads: Vec::new() };
        threads.spawn(first, 0, move || Ok(attends.run_once(NAP).map(drop)?))?;
        if let Some(mut serves) = serves {
            threads.spawn(second, 1, move || Ok(serves.run_once(NAP)?))?;
        }
        Ok(threads)
    }

    /// A thread that works on its CPU until it is told to stop.
    fn spawn(
        &mut self,
        cpu: usize,
        end: usize,
        work: impl FnMut() -> Result<(), BenchError> + Send + 'static,
    ) -> Result<(), BenchError> {
        let (stop, board) = (self.stop.clone(), self.board.clone());
        let body = move || work_until(|| stop.load(Ordering::Acquire), cpu, &board, end, work);
        let thread = std::thread::Builder::new().spawn(body).map_err(BenchError::system("starting a thread"))?;
        self.threads.push(thread);
        Ok(())
    }

    /// An error if one has ended.
    pub(super) fn look(&self) -> Result<(), BenchError> {
        if self.threads.iter().any(JoinHandle::is_finished) { Err(BenchError::Thread) } else { Ok(()) }
    }
}

/// Does an end's work on a CPU until told to stop. As long as stages that sleep follow one another the calling thread is scheduled
/// as the run is to be; when it has long had none it is ordinary, so that nobody waits for one that only spins.
pub(super) fn work_until(
    stop: impl Fn() -> bool,
    cpu: usize,
    board: &Board,
    end: usize,
    mut work: impl FnMut() -> Result<(), BenchError>,
) -> Result<(), BenchError> {
    pin(cpu)?;
    let (wanted, mut current) = (board.scheduling(), Scheduling::Ordinary);
    let side = &board.sides[end];
    let busy_ns = || side.busy_ns.load(Ordering::Relaxed);
    let sleeps = || sleeps(Duration::from_nanos(side.stage_ns.load(Ordering::Relaxed)));
    while !stop() {
        board.pass();
        let (before, started) = (busy_ns(), Instant::now());
        work()?;
        let next = match () {
            () if busy_ns() != before && sleeps() => wanted,
            () if started.elapsed() >= NAP => Scheduling::Ordinary,
            () => current,
        };
        if next != current {
            next.apply()?;
            current = next;
        }
    }
    Ok(())
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.board.rest(false);
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
