//! What the application's thread and the progress thread share is made of. Under `cfg(stepmesh_loom)` it is made of the
//! model checker loom's parts, which take both threads through every interleaving: `scripts/test loom`.

#[cfg(not(stepmesh_loom))]
mod machine {
    pub(crate) use crossbeam_queue::ArrayQueue;
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
}

#[cfg(stepmesh_loom)]
mod model {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
    use std::collections::VecDeque;

    /// Crossbeam's queue, which is taken to be right, as a model sees it.
    #[derive(Debug)]
    pub(crate) struct ArrayQueue<T> {
        values: loom::sync::Mutex<VecDeque<T>>,
        capacity: usize,
    }

    #[allow(clippy::unwrap_used)] // Poison is a failed model.
    impl<T> ArrayQueue<T> {
        pub(crate) fn new(capacity: usize) -> Self {
            Self { values: loom::sync::Mutex::new(VecDeque::new()), capacity }
        }

        pub(crate) fn push(&self, value: T) -> Result<(), T> {
            let mut values = self.values.lock().unwrap();
            if values.len() == self.capacity {
                return Err(value);
            }
            values.push_back(value);
            Ok(())
        }

        pub(crate) fn pop(&self) -> Option<T> {
            self.values.lock().unwrap().pop_front()
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.values.lock().unwrap().is_empty()
        }
    }
}

#[cfg(not(stepmesh_loom))]
pub(crate) use machine::*;
#[cfg(stepmesh_loom)]
pub(crate) use model::*;
