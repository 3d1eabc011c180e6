//! How far a suite has come, told to whoever watches, who may say that it is enough.

use crate::{BenchError, Report};
use std::ops::ControlFlow;

/// How far a run has come.
#[derive(Debug)]
pub enum Progress<'a, R> {
    /// A result is being taken, for the `attempt`th time.
    Taking {
        /// From 0.
        number: usize,
        /// Results in all.
        of: usize,
        /// From 1.
        attempt: usize,
    },
    /// A result is there.
    Done(&'a R),
}

/// What is told, and says whether to go on.
pub type Watcher<'a, R> = &'a mut dyn FnMut(Progress<'_, R>) -> ControlFlow<()>;

/// Tells of a step; an error if the watcher has had enough.
pub(crate) fn tell<R>(watcher: Watcher<'_, R>, step: Progress<'_, R>) -> Result<(), BenchError> {
    match watcher(step) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(BenchError::Interrupted),
    }
}

/// Tells of a result and keeps it, also if it is the last that is wanted.
pub(crate) fn keep<R>(report: &mut Report<R>, watcher: Watcher<'_, R>, result: R) -> Result<(), BenchError> {
    let goes_on = tell(watcher, Progress::Done(&result));
    report.results.push(result);
    goes_on
}
