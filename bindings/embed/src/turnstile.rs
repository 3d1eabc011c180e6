//! A member that several threads use. One thread at a time may touch it, and one of those that wait drives it: it polls,
//! and sleeps on the endpoint's event with the member in its hands. The others that wait are told when something has
//! changed; a thread that only wants to post or to look wakes the driver and gets the member from it.
//!
//! ```text
//!   with(f)          try the lock; else count as a guest, wake the driver, take the lock
//!   wait(.., check)  lead: poll, check, sleep   or follow: check when the leader says that something has changed
//!   drive(turn)      lead without sleeping; whoever sleeps with the value gives it up, and follows
//! ```

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use stepmesh_mesh::MeshError;
use stepmesh_transport::Waker;

/// The longest that a follower sleeps without looking.
const LOOK: Duration = Duration::from_millis(50);

/// Polls without sleeping, after which a thread whose CPU others need gives it up.
const POLLS: u32 = 64;

/// What a turnstile guards.
pub trait Driven {
    /// Makes progress without blocking.
    fn poll(&mut self) -> Result<(), MeshError>;
    /// A number that changes whenever somebody's wait may be over.
    fn settled(&mut self) -> u64;
    /// Sleeps until something may have happened; the turnstile's waker ends it.
    fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError>;
}

/// A member behind a lock that is given to whoever wants it.
pub struct Turnstile<T> {
    inner: Mutex<T>,
    waker: Waker,
    guests: AtomicUsize,
    leading: AtomicBool,
    /// Threads that lead without sleeping, or want to.
    drivers: AtomicUsize,
    followers: AtomicUsize,
    changes: Mutex<u64>,
    changed: Condvar,
}

/// Ends a thread's lead, however it ends.
struct Lead<'a, T>(&'a Turnstile<T>);

impl<T> Drop for Lead<'_, T> {
    fn drop(&mut self) {
        self.0.leading.store(false, Ordering::Release);
        if self.0.followers.load(Ordering::SeqCst) > 0 {
            self.0.announce();
        }
    }
}

impl<T> Turnstile<T> {
    fn announce(&self) {
        *self.changes.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }
}

impl<T: Driven> Turnstile<T> {
    /// `waker` ends the value's sleep.
    pub fn new(inner: T, waker: Waker) -> Self {
        Self {
            inner: Mutex::new(inner),
            waker,
            guests: AtomicUsize::new(0),
            leading: AtomicBool::new(false),
            drivers: AtomicUsize::new(0),
            followers: AtomicUsize::new(0),
            changes: Mutex::new(0),
            changed: Condvar::new(),
        }
    }

    /// Something short with the value if nobody else has it now.
    pub fn try_with<R>(&self, body: impl FnOnce(&mut T) -> R) -> Result<Option<R>, MeshError> {
        match self.inner.try_lock() {
            Ok(mut inner) => Ok(Some(body(&mut inner))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Poisoned(_)) => Err(MeshError::Panicked),
        }
    }

    /// Something short with the value.
    pub fn with<R>(&self, body: impl FnOnce(&mut T) -> R) -> Result<R, MeshError> {
        let mut inner = self.enter()?;
        Ok(body(&mut inner))
    }

    fn enter(&self) -> Result<MutexGuard<'_, T>, MeshError> {
        match self.inner.try_lock() {
            Ok(inner) => Ok(inner),
            Err(TryLockError::Poisoned(_)) => Err(MeshError::Panicked),
            Err(TryLockError::WouldBlock) => {
                self.guests.fetch_add(1, Ordering::SeqCst);
                self.waker.wake();
                let inner = self.inner.lock();
                self.guests.fetch_sub(1, Ordering::SeqCst);
                inner.map_err(|_| MeshError::Panicked)
            }
        }
    }

    /// Makes whoever drives look around.
    pub fn wake(&self) {
        self.waker.wake();
        self.announce();
    }

    /// Polls until `check` gives something, at most until `deadline`.
    pub fn wait<R>(
        &self,
        deadline: Instant,
        mut check: impl FnMut(&mut T) -> Option<R>,
    ) -> Result<Option<R>, MeshError> {
        loop {
            let found = if self.drivers.load(Ordering::SeqCst) == 0 && !self.leading.swap(true, Ordering::Acquire) {
                let _lead = Lead(self);
                self.lead(&mut check, |inner| {
                    let is_over = self.drivers.load(Ordering::SeqCst) > 0 || Instant::now() >= deadline;
                    if is_over { Ok(true) } else { inner.sleep(deadline).map(|()| false) }
                })
            } else {
                self.followers.fetch_add(1, Ordering::SeqCst);
                let followed = self.follow(deadline, &mut check);
                self.followers.fetch_sub(1, Ordering::SeqCst);
                followed
            };
            match found? {
                Some(found) => return Ok(Some(found)),
                None if Instant::now() >= deadline => return Ok(None),
                None => {}
            }
        }
    }

    /// Polls without sleeping until `turn` gives something: for what no event announces, such as a word that a GPU writes. Those
    /// that wait follow meanwhile.
    pub fn drive<R>(&self, mut turn: impl FnMut(&mut T) -> Option<R>) -> Result<R, MeshError> {
        self.drivers.fetch_add(1, Ordering::SeqCst);
        let driven = loop {
            if self.leading.swap(true, Ordering::Acquire) {
                self.waker.wake();
                std::thread::yield_now();
                continue;
            }
            let _lead = Lead(self);
            let mut polls = 0_u32;
            let driven = self.lead(&mut turn, |_| {
                polls = polls.wrapping_add(1);
                if polls.is_multiple_of(POLLS) {
                    std::thread::yield_now();
                }
                Ok(false)
            });
            if let Some(driven) = driven.transpose() {
                break driven;
            }
        };
        self.drivers.fetch_sub(1, Ordering::SeqCst);
        if self.followers.load(Ordering::SeqCst) > 0 {
            self.announce();
        }
        driven
    }

    /// Polls and checks; `rest` is what is done when there was nothing, and says whether that is the end of it.
    fn lead<R>(
        &self,
        check: &mut impl FnMut(&mut T) -> Option<R>,
        mut rest: impl FnMut(&mut T) -> Result<bool, MeshError>,
    ) -> Result<Option<R>, MeshError> {
        let mut settled = 0;
        let mut inner = self.inner.lock().map_err(|_| MeshError::Panicked)?;
        loop {
            inner.poll()?;
            if let Some(found) = check(&mut inner) {
                return Ok(Some(found));
            }
            if self.followers.load(Ordering::SeqCst) > 0 {
                let now = inner.settled();
                if now != settled {
                    settled = now;
                    self.announce();
                }
            }
            if self.guests.load(Ordering::SeqCst) > 0 {
                drop(inner);
                while self.guests.load(Ordering::SeqCst) > 0 {
                    std::thread::yield_now();
                }
                inner = self.inner.lock().map_err(|_| MeshError::Panicked)?;
                continue;
            }
            if rest(&mut inner)? {
                return Ok(None);
            }
        }
    }

    fn is_led(&self) -> bool {
        self.leading.load(Ordering::Acquire) || self.drivers.load(Ordering::SeqCst) > 0
    }

    /// Looks, and when there is nothing waits for a change, or for the lead to become free.
    fn follow<R>(
        &self,
        deadline: Instant,
        check: &mut impl FnMut(&mut T) -> Option<R>,
    ) -> Result<Option<R>, MeshError> {
        let seen = *self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = self.with(check)? {
            return Ok(Some(found));
        }
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now()).min(LOOK);
        let waited = self.changed.wait_timeout_while(changes, left, |changes| *changes == seen && self.is_led());
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
    use stepmesh_transport::Wake;

    /// Values that arrive from another thread, taken by whoever asks for them.
    struct Post {
        arriving: Receiver<Option<u32>>,
        here: VecDeque<u32>,
        arrived: u64,
    }

    impl Driven for Post {
        fn poll(&mut self) -> Result<(), MeshError> {
            while let Ok(value) = self.arriving.try_recv() {
                self.here.extend(value);
                self.arrived += u64::from(value.is_some());
            }
            Ok(())
        }

        fn settled(&mut self) -> u64 {
            self.arrived
        }

        fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
            match self.arriving.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(value) => {
                    self.here.extend(value);
                    self.arrived += u64::from(value.is_some());
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            Ok(())
        }
    }

    struct Knock(Mutex<Sender<Option<u32>>>);

    impl Wake for Knock {
        fn wake(&self) {
            let _ = self.0.lock().unwrap().send(None);
        }
    }

    fn post() -> (Arc<Turnstile<Post>>, Sender<Option<u32>>) {
        let (send, arriving) = channel();
        let post = Post { arriving, here: VecDeque::new(), arrived: 0 };
        (Arc::new(Turnstile::new(post, Waker(Arc::new(Knock(Mutex::new(send.clone())))))), send)
    }

    #[test]
    fn a_guest_gets_the_value_while_another_thread_waits() {
        let (turnstile, send) = post();
        let waiting = turnstile.clone();
        let waiter = std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(30);
            waiting.wait(deadline, |post| post.here.pop_front()).unwrap()
        });
        for _ in 0..100 {
            turnstile.with(|post| post.arrived).unwrap();
        }
        send.send(Some(5)).unwrap();
        assert_eq!(waiter.join().unwrap(), Some(5));
    }

    #[test]
    fn each_waiting_thread_gets_what_it_waits_for() {
        let (turnstile, send) = post();
        let waiters: Vec<_> = (0..8)
            .map(|wanted| {
                let turnstile = turnstile.clone();
                std::thread::spawn(move || {
                    let deadline = Instant::now() + Duration::from_secs(30);
                    let take = |post: &mut Post| {
                        let at = post.here.iter().position(|&value| value == wanted)?;
                        post.here.remove(at)
                    };
                    turnstile.wait(deadline, take).unwrap()
                })
            })
            .collect();
        for value in (0..8).rev() {
            send.send(Some(value)).unwrap();
        }
        for (wanted, waiter) in waiters.into_iter().enumerate() {
            assert_eq!(waiter.join().unwrap(), Some(wanted as u32));
        }
    }

    #[test]
    fn one_that_drives_gets_the_value_from_one_that_sleeps_and_has_it_follow() {
        let (turnstile, send) = post();
        let waiting = turnstile.clone();
        let waiter = std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(30);
            waiting.wait(deadline, |post| post.here.pop_front()).unwrap()
        });
        while !turnstile.leading.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let mut turns = 0;
        let driven = turnstile.drive(|_| {
            turns += 1;
            (turns == 10_000).then_some(turns)
        });
        assert_eq!(driven.unwrap(), 10_000);
        assert!(!waiter.is_finished());
        let mut sent = false;
        let driven = turnstile.drive(|post| {
            if !std::mem::replace(&mut sent, true) {
                send.send(Some(5)).unwrap();
            }
            (post.arrived == 1 && post.here.is_empty()).then_some(())
        });
        driven.unwrap();
        assert_eq!(waiter.join().unwrap(), Some(5));
    }

    #[test]
    fn a_wait_ends_at_its_deadline() {
        let (turnstile, _send) = post();
        assert_eq!(turnstile.wait(Instant::now(), |post| post.here.pop_front()).unwrap(), None);
    }
}
