//! What every suite hands out: the machine, the command, the results.

use crate::{Cpus, Machine};
use serde::Serialize;

/// All of a run, or what a run that failed had measured until then.
#[derive(Clone, Debug, Serialize)]
pub struct Report<R> {
    /// Where.
    pub machine: Machine,
    /// How to do it again.
    pub command: String,
    /// What came of it.
    pub results: Vec<R>,
}

impl<R> Report<R> {
    /// Nothing measured yet.
    pub fn new(cpus: Cpus, command: impl Into<String>) -> Self {
        Self { machine: Machine::describe(cpus), command: command.into(), results: Vec::new() }
    }
}
