//! What the arithmetic runs on: an instruction set, and threads that share the columns of large products.

use std::ops::Range;

use rayon::ThreadPool;

use super::Isa;
use crate::ModelError;

/// Multiply-adds below which a product is not worth sharing: some tens of microseconds.
const WORTH_SHARING: usize = 1 << 20;
/// More threads than any machine has cores.
const MOST_THREADS: usize = 1024;

/// The calling thread, and helpers that sleep while there is nothing for them.
#[derive(Debug)]
pub(crate) struct Cores {
    pub(crate) isa: Isa,
    helpers: Option<ThreadPool>,
    threads: usize,
}

impl Cores {
    /// The processor's widest instruction set on `threads` threads, the calling one included.
    pub(crate) fn new(threads: usize) -> Result<Self, ModelError> {
        Self::with_isa(Isa::detect(), threads)
    }

    pub(crate) fn with_isa(isa: Isa, threads: usize) -> Result<Self, ModelError> {
        let refused = |reason: String| ModelError::Threads { threads, reason };
        if !(1..=MOST_THREADS).contains(&threads) {
            return Err(refused(format!("use 1 to {MOST_THREADS}")));
        }
        let pool = || {
            let builder = rayon::ThreadPoolBuilder::new().num_threads(threads - 1);
            builder.thread_name(|i| format!("compute-{}", i + 1)).build().map_err(|error| refused(error.to_string()))
        };
        Ok(Self { isa, helpers: (threads > 1).then(pool).transpose()?, threads })
    }

    /// Does `part` for ranges that make up `0..count`, on several threads if `work`, in multiply-adds, is worth it.
    pub(crate) fn share_out(&self, count: usize, work: usize, part: &(dyn Fn(Range<usize>) + Sync)) {
        let Some(helpers) = self.helpers.as_ref().filter(|_| work >= WORTH_SHARING) else { return part(0..count) };
        let range = |i: usize| count * i / self.threads..count * (i + 1) / self.threads;
        helpers.in_place_scope(|scope| {
            for i in 1..self.threads {
                scope.spawn(move |_| part(range(i)));
            }
            part(range(0));
        });
    }
}
