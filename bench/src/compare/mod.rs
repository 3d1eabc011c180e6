//! Other systems on the same machine in the same run, taking turns with ours.

mod ucx;

pub use ucx::{Ucx, UcxTest};

use crate::transport::Mode;
use serde::Serialize;
use std::fmt;

/// Rounds in which ours and the peers take turns.
pub(crate) const ROUNDS: usize = 3;

/// One peer next to ours, at one size. Both figures are the smallest of the medians of the rounds.
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
    /// Bytes each way.
    pub bytes: usize,
    /// The peer's round trip. A peer that reports one way is counted twice.
    pub peer_p50_us: f64,
    /// Our round trip.
    pub ours_p50_us: f64,
    /// Ours / the peer's.
    pub ratio: f64,
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
