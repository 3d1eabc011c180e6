//! How a floor moves while something is measured on it, and what is done about it.

use crate::BenchError;
use serde::Serialize;

/// A floor that moved by more than this share during a row makes the row suspect.
const STEADY: f64 = 0.15;

/// How the floor moved during a row.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Drift {
    /// The floor before the row, in the unit of the floor.
    pub before: f64,
    /// And after it.
    pub after: f64,
    /// |after − before| as a share of the smaller.
    pub share: f64,
    /// How often the row had been taken then.
    pub attempt: usize,
}

impl Drift {
    pub(crate) fn new(before: f64, after: f64, attempt: usize) -> Self {
        Self { before, after, share: (after - before).abs() / before.min(after).max(f64::MIN_POSITIVE), attempt }
    }

    /// Whether the row can be trusted.
    pub fn is_steady(&self) -> bool {
        self.share <= STEADY
    }
}

/// Takes a row until its floor stands still, at most so often; the steadiest counts.
pub(crate) fn steadiest<R>(
    attempts: usize,
    drift: impl Fn(&R) -> Drift,
    mut take: impl FnMut(usize) -> Result<R, BenchError>,
) -> Result<R, BenchError> {
    let mut best = take(1)?;
    for attempt in 2..=attempts {
        if drift(&best).is_steady() {
            break;
        }
        let row = take(attempt)?;
        if drift(&row).share < drift(&best).share {
            best = row;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::{Drift, steadiest};

    #[test]
    fn a_row_is_taken_again_until_its_floor_stands_still() {
        let rows = [(1.0, 2.0), (1.0, 1.5), (1.0, 1.1), (1.0, 1.0)];
        let take = |attempt: usize| {
            let (before, after) = rows[attempt - 1];
            Ok(Drift::new(before, after, attempt))
        };
        let attempt = |attempts| steadiest(attempts, |drift: &Drift| *drift, take).map(|row| row.attempt).ok();
        assert_eq!(attempt(1), Some(1));
        assert_eq!(attempt(2), Some(2), "the better of two");
        assert_eq!(attempt(4), Some(3), "the first that is steady");
    }
}
