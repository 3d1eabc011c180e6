//! Peers that bounce messages of one size, beside a write-with-immediate (or a plain write) there and one back.

use super::{Comparison, Libfabric, Ucx, UcxTest};
use crate::floor::Perftest;
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
    let mut best: Vec<Result<[f64; 2], BenchError>> = peers.iter().map(|_| Ok([f64::INFINITY; 2])).collect();
    for _ in 0..rounds {
        for (peer, best) in peers.iter().zip(&mut best) {
            let Ok([ours, theirs]) = best else { continue };
            *ours = ours.min(pair.round_trip(peer.is_plain(pair.provider), Mode::Copy, bytes, cpus, budget)?.p50_us);
            match peer.round_trip_us(pair, bytes, cpus, budget) {
                Ok(round_trip_us) => *theirs = theirs.min(round_trip_us),
                Err(error) => *best = Err(error),
            }
        }
    }
    let comparison = |(peer, best): (&Bouncer, Result<[f64; 2], BenchError>)| {
        best.map(|[ours_p50_us, peer_p50_us]| Comparison {
            peer: peer.name().into(),
            version: peer.version().into(),
            provider: pair.provider.name(),
            mode: Mode::Copy,
            bytes,
            reply_bytes: bytes,
            peer_p50_us,
            ours_p50_us,
            ratio: ours_p50_us / peer_p50_us,
        })
    };
    Ok(peers.iter().zip(best).map(comparison).collect())
}
