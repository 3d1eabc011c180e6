//! The machine in words, as every report names it.

use crate::cpus::{Cpus, allowed};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;

/// Where a report was made, and with what.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's own name.
    pub cpu: String,
    /// CPUs that the process may use.
    pub cpus: usize,
    /// The CPUs that the measuring threads were pinned to.
    pub pinned: Vec<usize>,
    /// Its release.
    pub kernel: String,
    /// The load averages over 1, 5 and 15 minutes when the run ended: what else was running.
    pub load: [f64; 3],
    /// Of this program, and of what it was compared with.
    pub versions: BTreeMap<String, String>,
}

impl Machine {
    pub(crate) fn describe(cpus: Cpus) -> Self {
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            cpu: cpu.map_or(std::env::consts::ARCH, |(_, name)| name).to_owned(),
            cpus: allowed().len(),
            pinned: cpus.list().to_vec(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: load(),
            versions: BTreeMap::from([("stepmesh".into(), env!("CARGO_PKG_VERSION").into())]),
        }
    }

    /// The load of this moment.
    pub(crate) fn look_again(&mut self) {
        self.load = load();
    }
}

fn load() -> [f64; 3] {
    let mut load = [0.0; 3];
    for (average, word) in load.iter_mut().zip(read("/proc/loadavg").split(' ')) {
        *average = word.parse().unwrap_or_default();
    }
    load
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// One line.
impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cpus, pinned, kernel, load: [load, ..], .. } = self;
        write!(f, "{cpu}, {cpus} CPUs, pinned to {pinned:?}, Linux {kernel}, load {load:.1}")
    }
}
