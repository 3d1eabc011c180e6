//! Words that threads and processes share. Under `cfg(stepmesh_loom)` they are those of the model checker loom, which
//! takes the threads of a model through every interleaving, and through every value that a weakly ordered load may
//! return: what is written against this module is checked as it ships. `scripts/test loom` does it.

#[cfg(not(stepmesh_loom))]
mod machine {
    use rustix::thread::futex;
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
    use std::time::Duration;

    /// A counter that processes sleep on.
    #[repr(transparent)]
    pub(crate) struct Futex(AtomicU32);

    impl Futex {
        pub(crate) fn load(&self, ordering: Ordering) -> u32 {
            self.0.load(ordering)
        }

        pub(crate) fn increment(&self, ordering: Ordering) {
            self.0.fetch_add(1, ordering);
        }

        /// Sleeps for at most `timeout` unless it counts something else than `expected`. Interrupted, timed out, woken
        /// before: the caller looks in every case.
        pub(crate) fn wait(&self, expected: u32, timeout: Duration) {
            if let Ok(timeout) = timeout.try_into() {
                let _ = futex::wait(&self.0, futex::Flags::empty(), expected, Some(&timeout));
            }
        }

        /// Wakes one that sleeps.
        pub(crate) fn wake(&self) {
            let _ = futex::wake(&self.0, futex::Flags::empty(), 1);
        }
    }

    /// The word at an address.
    ///
    /// # Safety
    /// The address is aligned for `W`, an atomic, and mapped for `'a`; whatever process accesses it does so atomically.
    pub(crate) unsafe fn word<'a, W>(address: std::ptr::NonNull<u8>) -> &'a W {
        // SAFETY: passed on; every bit pattern is a value of an atomic.
        unsafe { address.cast::<W>().as_ref() }
    }
}

#[cfg(stepmesh_loom)]
mod model {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
    use loom::sync::{Condvar, Mutex};
    use std::time::Duration;

    /// As the kernel has it: the count is compared under the lock of those that sleep. No time passes in a model, so
    /// that a wake-up which gets lost is a deadlock.
    pub(crate) struct Futex {
        count: AtomicU32,
        sleepers: Mutex<()>,
        woken: Condvar,
    }

    impl Futex {
        #[cfg(test)]
        pub(crate) fn new() -> Self {
            Self { count: AtomicU32::new(0), sleepers: Mutex::new(()), woken: Condvar::new() }
        }

        pub(crate) fn load(&self, ordering: Ordering) -> u32 {
            self.count.load(ordering)
        }

        pub(crate) fn increment(&self, ordering: Ordering) {
            self.count.fetch_add(1, ordering);
        }

        pub(crate) fn wait(&self, expected: u32, _: Duration) {
            if let Ok(sleepers) = self.sleepers.lock()
                && self.count.load(Ordering::SeqCst) == expected
            {
                drop(self.woken.wait(sleepers));
            }
        }

        pub(crate) fn wake(&self) {
            let _sleepers = self.sleepers.lock();
            self.woken.notify_one();
        }
    }

    /// Never: loom's words are not in memory that is mapped. A model brings its own.
    pub(crate) unsafe fn word<'a, W>(_: std::ptr::NonNull<u8>) -> &'a W {
        unreachable!("a model has no mapped memory")
    }
}

#[cfg(not(stepmesh_loom))]
pub(crate) use machine::*;
#[cfg(stepmesh_loom)]
pub(crate) use model::*;
