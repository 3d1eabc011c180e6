//! A member, a thread that makes progress while the application computes, and the calls by which the application has it
//! meanwhile.

use super::baton::Baton;
use crate::MeshError;
use crate::member::Member;
use crate::sync::MutexGuard;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};
use stepmesh_transport::{Clock, TransportError, Wake, Waker};

/// How long no call may come before the progress thread takes over.
const ABSENCE: Duration = Duration::from_micros(100);
/// The longest that the progress thread sleeps.
const NAP: Duration = Duration::from_secs(1);

/// How an engine's progress thread runs.
#[derive(Clone, Debug)]
pub struct ProgressOptions {
    /// The thread's name, for debuggers and `top`, which show the first 15 bytes.
    pub name: String,
    /// The CPU that it is pinned to: one near the network interface that nothing else uses. Any by default.
    pub cpu: Option<usize>,
    /// How long a call that waits spins, and then yields, before it sleeps; and, with a CPU of its own, the progress thread
    /// while no calls come. Zero by default, which is right where there are fewer cores than threads that wait.
    pub spin: Duration,
}

impl Default for ProgressOptions {
    fn default() -> Self {
        Self { name: "stepmesh".into(), cpu: None, spin: Duration::ZERO }
    }
}

/// One side of the mesh.
pub(super) trait Driven: Send + 'static {
    /// What both sides have.
    fn member(&mut self) -> &mut Member;

    /// Makes progress without blocking.
    fn poll(&mut self) -> Result<(), MeshError>;

    /// Counts what the application may wait for besides events.
    fn arrived(&self) -> u64;
}

/// What both threads see of each other.
struct Shared<M> {
    baton: Baton<M>,
    waker: Waker,
    /// The progress thread.
    thread: OnceLock<Thread>,
    ended: OnceLock<Arc<MeshError>>,
}

impl<M> Shared<M> {
    fn resume(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    fn stop(&self) {
        self.baton.stop(|| self.waker.wake(), || self.resume());
    }

    /// The member is of no use any more.
    fn end(&self, error: MeshError) -> MeshError {
        let error = self.ended.get_or_init(|| Arc::new(error)).clone();
        self.stop();
        MeshError::Ended(error)
    }
}

/// The application's end. Dropping it stops and joins the thread.
pub(super) struct Engine<M: Driven> {
    shared: Arc<Shared<M>>,
    call: Arc<Call>,
    spin: Duration,
    /// What had arrived when the last sleep ended.
    seen: u64,
    thread: Option<JoinHandle<()>>,
}

/// The member in the application's hands.
struct Hand<'a, M> {
    mesh: Option<MutexGuard<'a, M>>,
    shared: &'a Shared<M>,
}

impl<M> Deref for Hand<'_, M> {
    type Target = M;

    #[allow(clippy::expect_used, reason = "it is there until the hand is dropped")]
    fn deref(&self) -> &M {
        self.mesh.as_ref().expect("held")
    }
}

impl<M> DerefMut for Hand<'_, M> {
    #[allow(clippy::expect_used, reason = "as above")]
    fn deref_mut(&mut self) -> &mut M {
        self.mesh.as_mut().expect("held")
    }
}

impl<M> Drop for Hand<'_, M> {
    fn drop(&mut self) {
        self.mesh = None;
        self.shared.baton.left(|| self.shared.resume());
    }
}

impl<M: Driven> Engine<M> {
    /// Starts the thread; it is pinned when this returns.
    pub(super) fn start(mut mesh: M, options: ProgressOptions) -> Result<Self, MeshError> {
        let ProgressOptions { name, cpu, spin } = options;
        if name.contains('\0') {
            return Err(TransportError::invalid(format!("a thread cannot be named {name:?}")).into());
        }
        let waker = mesh.member().waker();
        let call = Arc::new(Call { called: AtomicBool::new(false), waker: waker.clone() });
        let (thread, ended) = (OnceLock::new(), OnceLock::new());
        let shared = Arc::new(Shared { baton: Baton::new(mesh), waker, thread, ended });
        let (pinned, is_pinned) = mpsc::sync_channel(1);
        let ending = Ending(shared.clone());
        let body = move || {
            let _ = ending.0.thread.set(std::thread::current());
            let pinning = cpu.map_or(Ok(()), pin);
            let refused = pinning.is_err();
            let _ = pinned.send(pinning);
            if !refused && let Err(error) = run(&ending.0, cpu.map_or(Duration::ZERO, |_| spin)) {
                let _ = ending.0.end(error);
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(body);
        let thread = thread.map_err(|error| TransportError::system("starting a progress thread", error))?;
        let this = Self { shared, call, spin, seen: 0, thread: Some(thread) };
        match is_pinned.recv() {
            Ok(pinning) => pinning.map(|()| this),
            Err(_) => Err(MeshError::Panicked),
        }
    }

    /// The member, also after its end.
    fn look(&self) -> Result<Hand<'_, M>, MeshError> {
        let shared = &*self.shared;
        let mesh = shared.baton.take(|| shared.waker.wake(), std::thread::yield_now)?;
        Ok(Hand { mesh: Some(mesh), shared })
    }

    fn take(&self) -> Result<Hand<'_, M>, MeshError> {
        self.check()?;
        self.look()
    }

    /// An error if the engine has ended.
    fn check(&self) -> Result<(), MeshError> {
        self.shared.ended.get().map_or(Ok(()), |error| Err(MeshError::Ended(error.clone())))
    }

    fn poll(&self, mesh: &mut M) -> Result<(), MeshError> {
        mesh.poll().map_err(|error| self.shared.end(error))
    }

    /// What the member is like; none if a thread has panicked with it.
    pub(super) fn peek<T>(&self, look: impl FnOnce(&mut M) -> T) -> Option<T> {
        self.look().ok().map(|mut mesh| look(&mut mesh))
    }

    /// Something that takes no time.
    pub(super) fn with<T>(&self, call: impl FnOnce(&mut M) -> Result<T, MeshError>) -> Result<T, MeshError> {
        call(&mut *self.take()?)
    }

    /// The same; what is refused is tried once more when the member has been polled.
    pub(super) fn attempt<T>(&self, call: impl Fn(&mut M) -> Result<T, MeshError>) -> Result<T, MeshError> {
        let mut mesh = self.take()?;
        call(&mut mesh).or_else(|_| {
            self.poll(&mut mesh)?;
            call(&mut mesh)
        })
    }

    /// Drives the member until `ready` gives something, at most for `timeout`. `until` says when time alone may make it ready.
    pub(super) fn wait_for<T>(
        &self,
        timeout: Duration,
        mut ready: impl FnMut(&mut M) -> Option<T>,
        until: impl Fn(&M) -> Option<Instant>,
    ) -> Result<Option<T>, MeshError> {
        let mut since = None;
        // Looked at first, so that what came before the end is given out.
        let mut mesh = self.look()?;
        loop {
            if self.check().is_ok() {
                self.poll(&mut mesh)?;
            }
            if let Some(value) = ready(&mut mesh) {
                return Ok(Some(value));
            }
            self.check()?;
            let now = Instant::now();
            let (began, deadline) = *since.get_or_insert_with(|| (now, Clock::system().after(timeout)));
            if now >= deadline {
                return Ok(None);
            }
            if !pause(now.duration_since(began), self.spin) {
                let release = until(&mesh).unwrap_or(deadline);
                mesh.member().sleep(deadline.min(release)).map_err(|error| self.shared.end(error))?;
            }
        }
    }

    /// Drives the member until something has arrived or happened since the last call, or somebody wakes it.
    pub(super) fn sleep(&mut self, timeout: Duration) -> Result<(), MeshError> {
        let (call, seen) = (self.call.clone(), self.seen);
        let news = |mesh: &mut M| {
            let arrived = mesh.arrived();
            let is_called = call.called.swap(false, Ordering::SeqCst);
            (is_called || !mesh.member().events.is_empty() || arrived != seen).then_some(arrived)
        };
        self.seen = self.wait_for(timeout, news, |_| None)?.unwrap_or(seen);
        Ok(())
    }

    /// Makes the current or next [`Engine::sleep`] return.
    pub(super) fn waker(&self) -> Waker {
        Waker(self.call.clone())
    }
}

/// A call from another thread.
struct Call {
    called: AtomicBool,
    waker: Waker,
}

impl Wake for Call {
    fn wake(&self) {
        self.called.store(true, Ordering::SeqCst);
        self.waker.wake();
    }
}

impl<M: Driven> Drop for Engine<M> {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Says so when the thread ends, however it does.
struct Ending<M: Driven>(Arc<Shared<M>>);

impl<M: Driven> Drop for Ending<M> {
    fn drop(&mut self) {
        let _ = self.0.ended.set(Arc::new(MeshError::Panicked));
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

/// The progress thread.
fn run<M: Driven>(shared: &Shared<M>, spin: Duration) -> Result<(), MeshError> {
    let (baton, mut seen) = (&shared.baton, 0);
    let mut busy_at = Instant::now();
    while !baton.is_stopped() {
        if baton.is_visited(&mut seen) {
            std::thread::park_timeout(ABSENCE);
            busy_at = Instant::now();
            continue;
        }
        let Some(mut mesh) = baton.try_take()? else {
            baton.await_departure(|| std::thread::park_timeout(NAP));
            continue;
        };
        // Said before the member is let go: who takes it next finds that it has ended.
        mesh.poll().map_err(|error| shared.end(error))?;
        if busy_at.elapsed() >= 2 * spin {
            let slept = baton.sleep_with(&mut *mesh, |mesh| mesh.member().sleep(Instant::now() + NAP));
            slept.map_err(|error| shared.end(error))?;
            // What woke it may be followed by more.
            busy_at = Instant::now();
            continue;
        }
        drop(mesh);
        pause(busy_at.elapsed(), spin);
    }
    Ok(())
}
