//! A member as Python shares it: any thread, the lock of the interpreter released while it waits, closed at most once,
//! not to be used by a child that was forked off.

use crate::error::Failure;
use crate::process::{self, Open};
use pyo3::prelude::*;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use stepmesh_embed::{Driven, Turnstile};
use stepmesh_mesh::MeshError;
use stepmesh_transport::Waker;

/// The longest wait between two looks at signals.
const LOOK: Duration = Duration::from_millis(100);

/// What is shared, until it is closed.
struct Slot<T>(Option<T>);

impl<T: Driven> Driven for Slot<T> {
    fn poll(&mut self) -> Result<(), MeshError> {
        self.0.as_mut().map_or(Ok(()), T::poll)
    }

    fn settled(&mut self) -> u64 {
        self.0.as_mut().map_or(u64::MAX, T::settled)
    }

    fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
        self.0.as_mut().map_or(Ok(()), |inner| inner.sleep(deadline))
    }
}

/// A member, shared.
pub(crate) struct Shared<T: Driven + Send + 'static> {
    turnstile: ManuallyDrop<Turnstile<Slot<T>>>,
    generation: u32,
    number: u64,
}

fn closed() -> Failure {
    Failure::Closed("the mesh is closed".to_owned())
}

impl<T: Driven + Send + 'static> Shared<T> {
    pub(crate) fn new(inner: T, waker: Waker) -> Arc<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let shared = Arc::new(Self {
            turnstile: ManuallyDrop::new(Turnstile::new(Slot(Some(inner)), waker)),
            generation: process::generation(),
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
        });
        process::register(&shared);
        shared
    }

    /// Which one it is, in this process.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    fn check(&self) -> Result<(), Failure> {
        if self.generation != process::generation() {
            return Err(Failure::Forked);
        }
        if process::is_ending() {
            return Err(Failure::Closed("the interpreter ends: the mesh is closed".to_owned()));
        }
        Ok(())
    }

    /// Something short with the member. Nothing in `body` may want the interpreter's lock.
    pub(crate) fn with<R: Send>(
        &self,
        py: Python<'_>,
        body: impl FnOnce(&mut T) -> Result<R, Failure> + Send,
    ) -> Result<R, Failure> {
        self.check()?;
        let mut body = Some(body);
        let mut call = |slot: &mut Slot<T>| match (&mut slot.0, body.take()) {
            (Some(inner), Some(body)) => body(inner),
            _ => Err(closed()),
        };
        match self.turnstile.try_with(&mut call)? {
            Some(result) => result,
            None => process::detached(py, || self.turnstile.with(call))?,
        }
    }

    /// As [`Shared::with`], where the interpreter's lock is not at hand.
    pub(crate) fn with_unattached<R>(&self, body: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.check().ok()?;
        self.turnstile.with(|slot| slot.0.as_mut().map(body)).ok()?
    }

    /// Polls without sleeping until `turn` gives something; also where the interpreter's lock is not at hand.
    pub(crate) fn drive<R>(&self, mut turn: impl FnMut(&mut T) -> Option<Result<R, Failure>>) -> Result<R, Failure> {
        self.check()?;
        self.turnstile.drive(|slot| match &mut slot.0 {
            None => Some(Err(closed())),
            Some(inner) => self.check().err().map(Err).or_else(|| turn(inner)),
        })?
    }

    /// Makes progress without waiting.
    pub(crate) fn poll(&self, py: Python<'_>) -> Result<(), Failure> {
        self.with(py, |inner| Ok(inner.poll()?))
    }

    /// Looks, and polls until `check` gives something, for at most `timeout`; raises what signal handlers raise.
    pub(crate) fn wait<R: Send>(
        &self,
        py: Python<'_>,
        timeout: Duration,
        mut check: impl FnMut(&mut T) -> Option<Result<R, Failure>> + Send,
    ) -> Result<Option<R>, Failure> {
        self.check()?;
        let mut look = |slot: &mut Slot<T>| match &mut slot.0 {
            None => Some(Err(closed())),
            Some(inner) => check(inner).or_else(|| self.check().err().map(Err)),
        };
        let first = |slot: &mut Slot<T>| {
            look(slot).or_else(|| match slot.poll() {
                Ok(()) => look(slot),
                Err(error) => Some(Err(error.into())),
            })
        };
        if let Some(Some(found)) = self.turnstile.try_with(first)? {
            return found.map(Some);
        }
        let started = Instant::now();
        loop {
            let left = timeout.saturating_sub(started.elapsed());
            let until = Instant::now() + left.min(LOOK);
            let found = process::detached(py, || self.turnstile.wait(until, &mut look))?;
            if let Some(found) = found {
                return found.map(Some);
            }
            if timeout <= started.elapsed() {
                return Ok(None);
            }
            py.check_signals()?;
        }
    }

    /// Leaves. What is under way is lost.
    pub(crate) fn close(&self, py: Python<'_>) {
        if self.generation == process::generation() {
            process::detached(py, || Open::close(self));
        }
    }
}

impl<T: Driven + Send + 'static> Open for Shared<T> {
    fn wake(&self) {
        if self.generation == process::generation() {
            self.turnstile.wake();
        }
    }

    fn close(&self) {
        if self.generation == process::generation() {
            drop(self.turnstile.with(|slot| slot.0.take()));
            self.turnstile.wake();
        }
    }
}

impl<T: Driven + Send + 'static> Drop for Shared<T> {
    fn drop(&mut self) {
        // In a child the threads that a mesh joins when it is dropped do not exist.
        if self.generation == process::generation() {
            // SAFETY: dropped once, here.
            unsafe { ManuallyDrop::drop(&mut self.turnstile) };
        }
    }
}

/// A time-out as Python says it, in seconds; none is for ever.
pub(crate) fn seconds(timeout: Option<f64>) -> Result<Duration, Failure> {
    const EVER: Duration = Duration::from_secs(100 * 365 * 86_400);
    match timeout {
        None => Ok(EVER),
        Some(seconds) if seconds >= 0.0 => Ok(Duration::try_from_secs_f64(seconds).unwrap_or(EVER).min(EVER)),
        Some(seconds) => Err(Failure::Invalid(format!("timeout: {seconds} is no time in seconds"))),
    }
}
