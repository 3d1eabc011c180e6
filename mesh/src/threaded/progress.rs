//! The progress thread: drives a member, spins, then yields, then sleeps on the endpoint's event; ends when told to.

use super::doze::Doze;
use crate::MeshError;
use crate::sync::ArrayQueue;
use crossbeam_utils::sync::{Parker, Unparker};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use stepmesh_transport::{TransportError, Wake, Waker};

/// How an engine's progress thread runs.
#[derive(Clone, Debug)]
pub struct ProgressOptions {
    /// The thread's name, for debuggers and `top`, which show the first 15 bytes.
    pub name: String,
    /// The CPU that it is pinned to: one near the network interface. Any by default.
    pub cpu: Option<usize>,
    /// How long both threads spin when there is nothing to do, and then yield, before they sleep. Zero by default, which
    /// is right where there are fewer cores than pollers.
    pub spin: Duration,
}

impl Default for ProgressOptions {
    fn default() -> Self {
        Self { name: "stepmesh".into(), cpu: None, spin: Duration::ZERO }
    }
}

/// What a turn of the driver came to, the more the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// Nothing.
    Idle,
    /// Commands were carried out.
    Worked,
    /// There is something for the application's thread.
    Produced,
}

/// A member and the queues between it and the application's thread.
pub(super) trait Driver: Send + 'static {
    /// Carries out the commands and makes progress, without blocking.
    fn turn(&mut self) -> Result<Turn, MeshError>;

    /// Whether there are commands.
    fn has_commands(&self) -> bool;

    /// Sleeps until the endpoint's event or the next deadline.
    fn sleep(&mut self) -> Result<(), MeshError>;
}

/// What both threads see of each other.
struct Signals {
    doze: Doze,
    waker: Waker,
    unparker: Unparker,
    ended: OnceLock<Arc<MeshError>>,
}

/// The application's end. Dropping it stops and joins the thread.
pub(super) struct ProgressThread {
    signals: Arc<Signals>,
    parker: Parker,
    spin: Duration,
    thread: Option<JoinHandle<()>>,
}

impl ProgressThread {
    /// Starts the thread; it is pinned when this returns.
    pub(super) fn spawn(options: ProgressOptions, waker: Waker, driver: impl Driver) -> Result<Self, MeshError> {
        let ProgressOptions { name, cpu, spin } = options;
        if name.contains('\0') {
            return Err(TransportError::invalid(format!("a thread cannot be named {name:?}")).into());
        }
        let parker = Parker::new();
        let signals =
            Arc::new(Signals { doze: Doze::new(), waker, unparker: parker.unparker().clone(), ended: OnceLock::new() });
        let (pinned, is_pinned) = mpsc::sync_channel(1);
        let ending = Ending(signals.clone());
        let body = move || {
            let pinning = cpu.map_or(Ok(()), pin);
            let refused = pinning.is_err();
            let _ = pinned.send(pinning);
            if !refused && let Err(error) = run(driver, &ending.0, spin) {
                let _ = ending.0.ended.set(Arc::new(error));
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(body);
        let thread = thread.map_err(|error| TransportError::system("starting a progress thread", error))?;
        let this = Self { signals, parker, spin, thread: Some(thread) };
        match is_pinned.recv() {
            Ok(pinning) => pinning.map(|()| this),
            Err(_) => Err(MeshError::Panicked),
        }
    }

    /// An error if the thread has ended.
    pub(super) fn check(&self) -> Result<(), MeshError> {
        self.signals.ended.get().map_or(Ok(()), |error| Err(MeshError::Ended(error.clone())))
    }

    /// Gives the thread a command; waits while its queue is full.
    pub(super) fn send<T>(&self, commands: &ArrayQueue<T>, mut command: T) -> Result<(), MeshError> {
        loop {
            self.check()?;
            match commands.push(command) {
                Ok(()) => break,
                Err(full) => command = full,
            }
            self.nudge();
            std::thread::yield_now();
        }
        self.nudge();
        Ok(())
    }

    /// Says that there is something to look at.
    pub(super) fn nudge(&self) {
        self.signals.doze.nudge(|| self.signals.waker.wake());
    }

    /// Waits until `ready` gives something, at most until `deadline`.
    pub(super) fn wait_for<T>(
        &self,
        deadline: Instant,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Result<Option<T>, MeshError> {
        let began = Instant::now();
        loop {
            // Looked at first, so that what the thread gave before it ended is given out.
            let ended = self.check();
            if let Some(value) = ready() {
                return Ok(Some(value));
            }
            ended?;
            let now = Instant::now();
            if now >= deadline {
                return Ok(None);
            }
            if !pause(now.duration_since(began), self.spin) {
                self.parker.park_deadline(deadline);
            }
        }
    }

    /// Wakes [`ProgressThread::park`].
    pub(super) fn waker(&self) -> Waker {
        Waker(Arc::new(Unpark(self.parker.unparker().clone())))
    }

    /// Waits until the thread has something for this one, or has ended, at most so long.
    pub(super) fn park(&self, timeout: Duration) {
        self.parker.park_timeout(timeout);
    }
}

struct Unpark(Unparker);

impl Wake for Unpark {
    fn wake(&self) {
        self.0.unpark();
    }
}

impl Drop for ProgressThread {
    fn drop(&mut self) {
        self.signals.doze.stop(|| self.signals.waker.wake());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Says so when the thread ends, however it does.
struct Ending(Arc<Signals>);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.ended.set(Arc::new(MeshError::Panicked));
        self.0.unparker.unpark();
    }
}

fn pin(cpu: usize) -> Result<(), MeshError> {
    let mut cpus = CpuSet::new();
    if cpu >= CpuSet::MAX_CPU {
        return Err(TransportError::invalid(format!("CPU {cpu}: below {}", CpuSet::MAX_CPU)).into());
    }
    cpus.set(cpu);
    let pinning = sched_setaffinity(None, &cpus);
    pinning.map_err(|errno| TransportError::system(format!("pinning a progress thread to CPU {cpu}"), errno).into())
}

/// Spins, later yields; false when it is time to sleep.
fn pause(idle: Duration, spin: Duration) -> bool {
    if idle < spin {
        std::hint::spin_loop();
    } else if idle < 2 * spin {
        std::thread::yield_now();
    } else {
        return false;
    }
    true
}

fn run(mut driver: impl Driver, signals: &Signals, spin: Duration) -> Result<(), MeshError> {
    let mut busy_at = Instant::now();
    while !signals.doze.is_stopped() {
        match driver.turn()? {
            Turn::Idle if pause(busy_at.elapsed(), spin) => {}
            Turn::Idle => {
                let driver = &mut driver;
                signals.doze.doze(driver, |driver| driver.has_commands(), |driver| driver.sleep())?;
                // What woke it may be followed by more.
                busy_at = Instant::now();
            }
            turn => {
                if turn == Turn::Produced {
                    signals.unparker.unpark();
                }
                busy_at = Instant::now();
            }
        }
    }
    Ok(())
}
