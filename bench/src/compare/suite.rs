//! `compare`: every peer that is installed, at every size, over every provider, in turn with ours.

use super::{Bouncer, Comparison, Echo, Failure, Libfabric, Line, ROUNDS, System, Ucx, UcxTest, beside, turns};
use crate::progress::{Progress, Watcher, keep, tell};
use crate::timing::Statistic;
use crate::transport::{Mode, Pair};
use crate::{BenchError, Cpus, Report, floor, pushpull};
use std::path::Path;
use std::time::Duration;
use stepmesh_transport::{DeviceOptions, Provider};

/// The sizes of messages that bounce.
pub const SIZES: [usize; 4] = [8, 7 << 10, 64 << 10, 896 << 10];
/// A request and its reply: one token's hidden state, and those of the paper's microbatch.
pub const ECHOES: [[u32; 2]; 2] = [[7168, 14336], [896 << 10, 1792 << 10]];

/// The peers of this machine.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    /// Beside our transport.
    pub bouncers: Vec<Bouncer>,
    /// Beside our mesh.
    pub echoes: Vec<Echo>,
    /// Those that are not here, and what to install.
    pub absent: Vec<String>,
}

impl Peers {
    /// Looks for all that are known; those in Python by this interpreter.
    pub fn find(python: &Path) -> Self {
        let mut peers = Self::default();
        match Ucx::find() {
            Some(ucx) => peers.bouncers.extend(UcxTest::ALL.map(|test| Bouncer::Ucx(ucx.clone(), test))),
            None => peers.absent.push("UCX (Debian: ucx-utils)".into()),
        }
        match Libfabric::find() {
            Some(libfabric) => peers.bouncers.push(Bouncer::Libfabric(libfabric)),
            None => peers.absent.push("libfabric (Debian: libfabric-bin)".into()),
        }
        if floor::Perftest::is_installed() {
            peers.bouncers.extend(["ib_write_lat", "ib_send_lat"].map(Bouncer::Perftest));
        } else {
            peers.absent.push("perftest (Debian: perftest)".into());
        }
        for system in System::ALL {
            match Echo::find(python, system) {
                Some(echo) => peers.echoes.push(echo),
                None => {
                    let (python, packages) = (python.display(), system.packages());
                    peers.absent.push(format!("{} ({python} -m pip install {packages})", system.name()));
                }
            }
        }
        peers
    }
}

/// What is compared.
#[derive(Clone, Debug)]
pub struct Options {
    /// Over which providers.
    pub providers: Vec<Provider>,
    /// Bytes of messages that bounce.
    pub sizes: Vec<usize>,
    /// Bytes of requests and replies.
    pub echoes: Vec<[u32; 2]>,
    /// With whom.
    pub peers: Peers,
    /// A short look, to see that everything works.
    pub quick: bool,
    /// The CPUs of the two ends.
    pub cpus: Cpus,
    /// How the devices are opened.
    pub device: DeviceOptions,
}

impl Options {
    /// Everything over `shm` and `tcp`.
    pub fn new(peers: Peers, cpus: Cpus) -> Self {
        Self {
            providers: vec![Provider::Shm, Provider::Tcp],
            sizes: SIZES.to_vec(),
            echoes: ECHOES.to_vec(),
            peers,
            quick: false,
            cpus,
            device: DeviceOptions::default(),
        }
    }

    fn budget(&self) -> Duration {
        Duration::from_millis(if self.quick { 50 } else { 300 })
    }

    fn rounds(&self) -> usize {
        if self.quick { 1 } else { ROUNDS }
    }
}

/// Runs the suite into `report`. What was measured before an error, or before `progress` said to stop, is there. A peer
/// that fails is a result of its own.
///
/// # Errors
/// When a provider cannot be opened on this machine, when our ends do not find each other or what was sent does not arrive,
/// or when `progress` says to stop.
pub fn run(options: &Options, report: &mut Report<Line>, progress: Watcher<'_, Line>) -> Result<(), BenchError> {
    let of = options.providers.len() * (options.sizes.len() + options.echoes.len());
    let mut number = 0;
    let mut next = |progress: Watcher<'_, Line>| {
        number += 1;
        tell(progress, Progress::Taking { number: number - 1, of, attempt: 1 })
    };
    for &provider in &options.providers {
        let mut bouncers = options.peers.bouncers.clone();
        bouncers.retain(|peer| peer.speaks(provider));
        let mut echoes = options.peers.echoes.clone();
        echoes.retain(|peer| peer.system.speaks(provider));
        let mut pair = Pair::connect(provider, &options.device, &options.sizes)?;
        for &bytes in &options.sizes {
            next(progress)?;
            let (cpus, budget) = (options.cpus, options.budget());
            let found = beside(&mut pair, &bouncers, bytes, cpus, budget, options.rounds())?;
            let names: Vec<_> = bouncers.iter().map(Bouncer::name).collect();
            let failed = keep_all(report, progress, provider, bytes, &names, found)?;
            bouncers.retain(|peer| !failed.contains(&peer.name()));
        }
        drop(pair);
        for &bytes in &options.echoes {
            next(progress)?;
            let found = beside_mesh(options, provider, &echoes, bytes)?;
            let names: Vec<_> = echoes.iter().map(|peer| peer.system.name()).collect();
            let failed = keep_all(report, progress, provider, bytes[0] as usize, &names, found)?;
            echoes.retain(|peer| !failed.contains(&peer.system.name()));
        }
    }
    report.machine.look_again();
    Ok(())
}

/// Keeps what was found of each peer; the names of those that failed.
fn keep_all(
    report: &mut Report<Line>,
    progress: Watcher<'_, Line>,
    provider: Provider,
    bytes: usize,
    names: &[&'static str],
    found: Vec<Result<Comparison, BenchError>>,
) -> Result<Vec<&'static str>, BenchError> {
    let mut failed = Vec::new();
    for (&peer, found) in names.iter().zip(found) {
        let line = match found {
            Ok(comparison) => Line::Comparison(comparison),
            Err(error) => {
                failed.push(peer);
                Line::Failure(Failure {
                    peer: peer.into(),
                    provider: provider.name(),
                    bytes,
                    failed: error.to_string(),
                })
            }
        };
        keep(report, progress, line)?;
    }
    Ok(failed)
}

/// Rounds of our mesh and of the peers in turn. The peers send from memory that they have registered: so do we over sockets;
/// over shared memory they copy it once to the other side, and so do we.
fn beside_mesh(
    options: &Options,
    provider: Provider,
    peers: &[Echo],
    bytes: [u32; 2],
) -> Result<Vec<Result<Comparison, BenchError>>, BenchError> {
    let (cpus, budget) = (options.cpus, options.budget());
    let mode = if provider == Provider::Shm { Mode::Copy } else { Mode::InPlace };
    let found = turns::take(peers, options.rounds(), |peer| {
        let ours = pushpull::plain_round_us(provider, &options.device, bytes, mode, cpus, options.quick)?;
        Ok((ours, peer.round_trip_us(provider, bytes, cpus, budget)))
    })?;
    let comparison = |(peer, found): (&Echo, Result<_, _>)| {
        let (name, bytes) = (peer.system.name(), bytes.map(|bytes| bytes as usize));
        found.map(|figures| Comparison::new(name, &peer.version, provider, mode, bytes, Statistic::Median, figures))
    };
    Ok(peers.iter().zip(found).map(comparison).collect())
}
