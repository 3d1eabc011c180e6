//! What the application's thread and the progress thread share is made of. Under `cfg(stepmesh_loom)` it is made of the
//! model checker loom's parts, which take both threads through every interleaving: `scripts/test loom`.

#[cfg(not(stepmesh_loom))]
mod machine {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
    pub(crate) use std::sync::{Mutex, MutexGuard};
}

#[cfg(stepmesh_loom)]
mod model {
    use loom::cell::{MutPtr, UnsafeCell};
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
    use std::ops::{Deref, DerefMut};
    use std::sync::TryLockError;

    /// A lock that is only tried: loom's own waits when it is tried.
    pub(crate) struct Mutex<T> {
        held: AtomicBool,
        value: UnsafeCell<T>,
    }

    pub(crate) struct MutexGuard<'a, T> {
        held: &'a AtomicBool,
        value: Option<MutPtr<T>>,
    }

    // SAFETY: whoever sees the value has found `held` false and made it true, with acquire and release; loom looks on.
    unsafe impl<T: Send> Sync for Mutex<T> {}

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self { held: AtomicBool::new(false), value: UnsafeCell::new(value) }
        }

        #[allow(clippy::type_complexity)] // The standard library's.
        pub(crate) fn try_lock(&self) -> Result<MutexGuard<'_, T>, TryLockError<MutexGuard<'_, T>>> {
            let (acquired, failed) = (Ordering::Acquire, Ordering::Relaxed);
            match self.held.compare_exchange(false, true, acquired, failed) {
                Ok(_) => Ok(MutexGuard { held: &self.held, value: Some(self.value.get_mut()) }),
                Err(_) => Err(TryLockError::WouldBlock),
            }
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            // SAFETY: the lock is held; there until it is dropped.
            unsafe { self.value.as_ref().unwrap().deref() }
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            // SAFETY: as above.
            unsafe { self.value.as_ref().unwrap().deref() }
        }
    }

    impl<T> Drop for MutexGuard<'_, T> {
        fn drop(&mut self) {
            self.value = None;
            self.held.store(false, Ordering::Release);
        }
    }
}

#[cfg(not(stepmesh_loom))]
pub(crate) use machine::*;
#[cfg(stepmesh_loom)]
pub(crate) use model::*;
