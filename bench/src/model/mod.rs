//! How fast the model computes on this machine: matrix products against what its processor multiplies and adds at most,
//! and decoding beside PyTorch.

mod gemm;
mod pytorch;
mod row;

pub use pytorch::PyTorch;
pub use row::{Decode, Floor, Gemm, PeerFigures, Row};

use crate::progress::{keep, tell};
use crate::{BenchError, Progress, Report, Watcher};
use std::time::Duration;
use stepmesh_model::LinearKind;

/// Hidden size of the released Step-3, and the intermediate size of one of its experts.
const HIDDEN: usize = 7168;
const EXPERT: usize = 5120;
/// A row whose floor moved is taken so often at most.
const ATTEMPTS: usize = 3;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads that share a product.
    pub threads: usize,
    /// Tokens of an expert's batch.
    pub tokens: usize,
    /// Name, rows and columns of the weights.
    pub layers: Vec<(&'static str, usize, usize)>,
    /// For how long each product is measured.
    pub time: Duration,
    /// Rounds of decoding.
    pub rounds: usize,
}

impl Options {
    /// The expert of the released Step-3 with a batch of 128 tokens.
    pub fn new(threads: usize) -> Self {
        Self {
            threads,
            tokens: 128,
            layers: vec![("gate, up", EXPERT, HIDDEN), ("down", HIDDEN, EXPERT)],
            time: Duration::from_millis(1500),
            rounds: 5,
        }
    }

    /// A short look at an eighth of the expert.
    pub fn quick(&mut self) {
        self.layers = vec![("gate, up", EXPERT / 8, HIDDEN / 8), ("down", HIDDEN / 8, EXPERT / 8)];
        self.time = Duration::from_millis(50);
        self.rounds = 1;
    }

    fn products(&self) -> impl Iterator<Item = (&(&'static str, usize, usize), LinearKind)> {
        self.layers.iter().flat_map(|layer| LinearKind::ALL.map(|kind| (layer, kind)))
    }

    /// Results in all.
    fn count(&self) -> usize {
        self.products().count() + 1
    }
}

/// Measures the products of an expert into `report`.
///
/// # Errors
/// A product could not be made, or the watcher has had enough.
pub fn products(options: &Options, report: &mut Report<Row>, watcher: Watcher<'_, Row>) -> Result<(), BenchError> {
    for (number, (layer, kind)) in options.products().enumerate() {
        let row = crate::drift::steadiest(
            ATTEMPTS,
            |row: &Gemm| row.drift,
            |attempt| {
                tell(watcher, Progress::Taking { number, of: options.count(), attempt })?;
                gemm::take(options, layer, kind, attempt)
            },
        )?;
        keep(report, watcher, Row::Gemm(row))?;
    }
    Ok(())
}

/// Measures decoding, in turn with PyTorch where it is there: `ours` decodes once and says how many tokens a second.
///
/// # Errors
/// A round failed, or the watcher has had enough.
pub fn decoding(
    options: &Options,
    mut row: Decode,
    ours: &mut dyn FnMut() -> Result<f64, BenchError>,
    peer: Option<&PyTorch>,
    report: &mut Report<Row>,
    watcher: Watcher<'_, Row>,
) -> Result<(), BenchError> {
    let (mut rates, mut theirs) = (Vec::new(), vec![Vec::new(); pytorch::DTYPES.len()]);
    for attempt in 1..=options.rounds {
        tell(watcher, Progress::Taking { number: options.count() - 1, of: options.count(), attempt: 1 })?;
        rates.push(ours()?);
        for (dtype, rates) in pytorch::DTYPES.iter().zip(&mut theirs) {
            // The slowest of them need not be asked as often as the rest.
            if let Some(peer) = peer.filter(|_| attempt <= options.rounds.div_ceil(2)) {
                rates.push(peer.tokens_per_s(dtype, options.threads, &row)?);
            }
        }
    }
    row.tokens_per_s = median(&mut rates);
    if let Some(peer) = peer {
        row.peers = pytorch::DTYPES
            .iter()
            .zip(&mut theirs)
            .map(|(dtype, rates)| PeerFigures::new(peer, dtype, median(rates), row.tokens_per_s))
            .collect();
    }
    keep(report, watcher, Row::Decode(row))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
