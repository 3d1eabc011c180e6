//! Peers that a program in Python would use between attention and FFN: a request of one size, a reply of another, by two
//! processes that spin, beside whole rounds of our mesh with one copy each way.

use crate::process::Process;
use crate::{BenchError, Cpus};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use stepmesh_transport::Provider;

const SCRIPT: &str = include_str!("echo.py");
/// How long one run may take beyond its measuring.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// The naive choice: arrays over a pair of sockets.
    ZeroMq,
    /// NVIDIA's transfer library, over UCX.
    Nixl,
    /// The transfer engine of Mooncake.
    Mooncake,
}

impl System {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::ZeroMq, Self::Nixl, Self::Mooncake];

    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ZeroMq => "zeromq_numpy",
            Self::Nixl => "nixl",
            Self::Mooncake => "mooncake",
        }
    }

    /// What to install.
    pub fn packages(self) -> &'static str {
        match self {
            Self::ZeroMq => "pyzmq numpy",
            Self::Nixl => "nixl numpy",
            Self::Mooncake => "mooncake-transfer-engine-non-cuda numpy",
        }
    }

    /// Whether it has a transport for the same purpose.
    pub fn speaks(self, provider: Provider) -> bool {
        match self {
            Self::ZeroMq | Self::Nixl => matches!(provider, Provider::Shm | Provider::Tcp),
            Self::Mooncake => provider == Provider::Tcp,
        }
    }
}

/// An installed one.
#[derive(Clone, Debug)]
pub struct Echo {
    python: PathBuf,
    /// Which.
    pub system: System,
    /// Of the package.
    pub version: String,
}

#[derive(Deserialize)]
struct Said {
    p50_us: f64,
}

impl Echo {
    /// That of an interpreter, if it can import it.
    pub fn find(python: &Path, system: System) -> Option<Self> {
        let output = Command::new(python).args(["-c", SCRIPT, "version", system.name()]).output().ok()?;
        let version = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
        Some(Self { python: python.into(), system, version: version.trim().to_owned() })
    }

    /// The median round trip of so many bytes there and back, over about `budget`.
    pub(crate) fn round_trip_us(
        &self,
        provider: Provider,
        [a2f_bytes, f2a_bytes]: [u32; 2],
        cpus: Cpus,
        budget: Duration,
    ) -> Result<f64, BenchError> {
        let [attention, ffn] = cpus.list();
        let mut command = Command::new(&self.python);
        command.args(["-c", SCRIPT, "run", self.system.name(), provider.name()]);
        command.args([a2f_bytes, f2a_bytes].map(|bytes| bytes.to_string()));
        command.arg(budget.as_secs_f64().to_string()).args([attention, ffn].map(|cpu| cpu.to_string()));
        command.env("OMP_NUM_THREADS", "1").env("UCX_WARN_UNUSED_ENV_VARS", "n");
        match provider {
            Provider::Shm => command.env("UCX_TLS", "posix,cma,self"),
            _ => command.env("UCX_TLS", "tcp").env("UCX_NET_DEVICES", "lo"),
        };
        let said = Process::start(&mut command)?.finish(Instant::now() + budget + PATIENCE)?;
        let figures = said.lines().rev().find_map(|line| serde_json::from_str::<Said>(line).ok());
        figures.map(|said| said.p50_us).filter(|p50_us| *p50_us > 0.0).ok_or_else(|| BenchError::Peer {
            peer: self.system.name().into(),
            reason: format!("no figures in what it says: {}", said.trim()),
        })
    }
}
