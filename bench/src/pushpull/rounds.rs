//! A row over RDMA: whole rounds of floor, ours and floor again, since a fabric drifts more within a row than two floors
//! around it show. The round with the middle ratio is the row.

use super::row::{self, Row};
use super::{Options, Plan};
use crate::BenchError;

/// Takes a row in so many rounds.
pub(super) fn take(options: &Options, plan: &Plan, attempt: usize) -> Result<Row, BenchError> {
    let rounds = (0..options.rounds()).map(|_| row::take(options, plan, attempt));
    let mut rounds = rounds.collect::<Result<Vec<_>, _>>()?;
    let figures: Vec<_> = rounds.iter().filter_map(|row| Some([row.p50_us, row.floor.as_ref()?.p50_us])).collect();
    rounds.sort_by(|a, b| a.ratio.unwrap_or_default().total_cmp(&b.ratio.unwrap_or_default()));
    let middle = rounds.len() / 2;
    Ok(Row { rounds_us: figures, ..rounds.swap_remove(middle) })
}
