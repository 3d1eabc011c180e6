//! What comparing found, in JSON and as lines of a table.

use super::turns::{self, Rounds};
use crate::timing::Statistic;
use crate::transport::Mode;
use serde::Serialize;
use std::fmt;
use stepmesh_transport::Provider;

/// One peer next to ours, at one size: the round with the middle ratio.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The peer and what of it: `ucx_put`.
    pub peer: String,
    /// Of the peer.
    pub version: String,
    /// What both run over.
    pub provider: &'static str,
    /// Where ours are produced.
    pub mode: Mode,
    /// Bytes there.
    pub bytes: usize,
    /// Bytes back.
    pub reply_bytes: usize,
    /// What of the round trips is compared: the median, but the mean where that is all that the peer tells, or all that it
    /// tells well.
    pub statistic: Statistic,
    /// The peer's round trip, by that statistic. A peer that reports one way is counted twice.
    pub peer_p50_us: f64,
    /// Our round trip, by the same.
    pub ours_p50_us: f64,
    /// Ours / the peer's.
    pub ratio: f64,
    /// Ours and the peer's of every round, in microseconds.
    pub rounds: Vec<[f64; 2]>,
}

impl Comparison {
    /// Of the rounds of ours and of the peer's.
    pub(super) fn new(
        peer: &str,
        version: &str,
        provider: Provider,
        mode: Mode,
        [bytes, reply_bytes]: [usize; 2],
        statistic: Statistic,
        rounds: Rounds,
    ) -> Self {
        let [ours_p50_us, peer_p50_us] = turns::middle(&rounds);
        Self {
            peer: peer.into(),
            version: version.into(),
            provider: provider.name(),
            mode,
            bytes,
            reply_bytes,
            statistic,
            peer_p50_us,
            ours_p50_us,
            ratio: ours_p50_us / peer_p50_us,
            rounds,
        }
    }
}

/// A peer that could not be measured.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// Which.
    pub peer: String,
    /// Over what.
    pub provider: &'static str,
    /// Bytes there.
    pub bytes: usize,
    /// What it said.
    pub failed: String,
}

/// One result.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Line {
    /// Ours next to a peer.
    Comparison(Comparison),
    /// A peer that failed; it is not asked again over the same provider.
    Failure(Failure),
}

/// A line of the table, under [`Row::HEAD`](crate::transport::Row::HEAD).
impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { peer, version, mode, bytes, peer_p50_us, ours_p50_us, ratio, .. } = self;
        let peer = format!("{peer} {version}");
        write!(
            f,
            "{:<14} {mode:<9} {bytes:>8} {ours_p50_us:>10.3} {:>10} {:>8}  {peer:<22} {peer_p50_us:>10.3} {:>8}  {ratio:>5.2}",
            "against", "", "", ""
        )
    }
}

impl Line {
    /// The head of the table that lines are of.
    pub const HEAD: &'static str =
        "provider  bytes there  and back  peer                         peer p50 µs  ours p50 µs  ours / peer";
}

/// A line of the table of `bench compare`.
impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Comparison(Comparison {
                peer,
                version,
                provider,
                bytes,
                reply_bytes,
                peer_p50_us,
                ours_p50_us,
                ratio,
                ..
            }) => {
                let peer = format!("{peer} {version}");
                write!(
                    f,
                    "{provider:<9} {bytes:>11} {reply_bytes:>9}  {peer:<28} {peer_p50_us:>11.3} {ours_p50_us:>12.3} \
                     {ratio:>12.2}"
                )
            }
            Self::Failure(Failure { peer, provider, bytes, failed }) => {
                write!(f, "{provider:<9} {bytes:>11} {:>9}  {peer} failed: {failed}", "")
            }
        }
    }
}
