//! Peers that bounce messages of one size, beside a write-with-immediate (or a plain write) there and one back.

use super::{Comparison, Libfabric, Ucx, UcxTest, turns};
use crate::floor::Perftest;
use crate::timing::Statistic;
use crate::transport::{Mode, Pair};
use crate::{BenchError, Cpus};
use std::time::Duration;
use stepmesh_transport::Provider;

/// One test of a peer.
#[derive(Clone, Debug)]
pub enum Bouncer {
    /// Of UCX.
    Ucx(Ucx, UcxTest),
    /// Of libfabric.
    Libfabric(Libfabric),
    /// The program of perftest.
    Perftest(&'static str),
}

impl Bouncer {
    /// As reports name it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ucx(_, test) => test.name(),
            Self::Libfabric(_) => "libfabric",
            Self::Perftest(program) => program,
        }
    }

    fn version(&self) -> &str {
        match self {
            Self::Ucx(ucx, _) => &ucx.version,
            Self::Libfabric(libfabric) => &libfabric.version,
            Self::Perftest(_) => "",
        }
    }

    /// Whether it has a transport for the same purpose.
    pub fn speaks(&self, provider: Provider) -> bool {
        match self {
            Self::Ucx(..) => Ucx::speaks(provider),
            Self::Libfabric(_) => Libfabric::speaks(provider),
            Self::Perftest(_) => provider == Provider::Verbs,
        }
    }

    /// Whether its receiver polls memory and is told of nothing: ours is a plain write then.
    fn is_plain(&self, provider: Provider) -> bool {
        match self {
            Self::Ucx(_, test) => provider == Provider::Shm && *test == UcxTest::Put,
            Self::Libfabric(_) => false,
            Self::Perftest(program) => *program == "ib_write_lat",
        }
    }

    /// What it tells, and what of ours is set beside it.
    fn statistic(&self, provider: Provider) -> Statistic {
        match self {
            Self::Ucx(..) => Ucx::statistic(provider),
            Self::Libfabric(_) => Statistic::Mean,
            Self::Perftest(_) => Statistic::Median,
        }
    }

    fn round_trip_us(&self, pair: &Pair, bytes: usize, cpus: Cpus, budget: Duration) -> Result<f64, BenchError> {
        match self {
            Self::Ucx(ucx, test) => ucx.round_trip_us(*test, pair.provider, bytes, cpus, budget),
            Self::Libfabric(libfabric) => libfabric.round_trip_us(pair.provider, bytes, cpus, budget),
            Self::Perftest(program) => {
                let count = (budget.as_micros() / 100).clamp(100, 10_000) as u64;
                Ok(Perftest::new(&pair.rdma_devices, cpus)?.round_trips(program, bytes, count)?.p50_us)
            }
        }
    }
}

/// Ours and the peers in turn: what each came to, or why it did not.
pub(crate) fn beside(
    pair: &mut Pair,
    peers: &[Bouncer],
    bytes: usize,
    cpus: Cpus,
    budget: Duration,
    rounds: usize,
) -> Result<Vec<Result<Comparison, BenchError>>, BenchError> {
    let found = turns::take(peers, rounds, |peer| {
        let ours = pair.round_trip(peer.is_plain(pair.provider), Mode::Copy, bytes, cpus, budget)?;
        Ok((ours.told_by(peer.statistic(pair.provider)), peer.round_trip_us(pair, bytes, cpus, budget)))
    })?;
    let provider = pair.provider;
    let comparison = |(peer, found): (&Bouncer, Result<_, _>)| {
        let statistic = peer.statistic(provider);
        let new =
            |rounds| Comparison::new(peer.name(), peer.version(), provider, Mode::Copy, [bytes; 2], statistic, rounds);
        found.map(new)
    };
    Ok(peers.iter().zip(found).map(comparison).collect())
}
