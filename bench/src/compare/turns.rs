//! Ours and the peers in turn.

use crate::BenchError;

/// The smallest of so many rounds, ours and the peer's, of each peer; or why a peer has none. `round` takes ours, and then
/// the peer's.
///
/// # Errors
/// When ours cannot be taken.
pub(super) fn take<P>(
    peers: &[P],
    rounds: usize,
    mut round: impl FnMut(&P) -> Result<(f64, Result<f64, BenchError>), BenchError>,
) -> Result<Vec<Result<[f64; 2], BenchError>>, BenchError> {
    let mut best: Vec<_> = peers.iter().map(|_| Ok([f64::INFINITY; 2])).collect();
    for _ in 0..rounds {
        for (peer, best) in peers.iter().zip(&mut best) {
            let Ok([ours, theirs]) = best else { continue };
            match round(peer)? {
                (ours_us, Ok(theirs_us)) => (*ours, *theirs) = (ours.min(ours_us), theirs.min(theirs_us)),
                (_, Err(error)) => *best = Err(error),
            }
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::take;
    use crate::BenchError;

    #[test]
    fn the_smallest_counts_and_who_fails_is_not_asked_again() {
        let mut asked = Vec::new();
        let found = take(&["good", "bad"], 3, |&peer| {
            asked.push(peer);
            let turn = asked.len() as f64;
            Ok((turn, if peer == "good" { Ok(10.0 - turn) } else { Err(BenchError::Stopped) }))
        });
        let found = found.expect("ours");
        assert_eq!(asked, ["good", "bad", "good", "good"]);
        assert_eq!(found[0].as_ref().ok(), Some(&[1.0, 6.0]));
        assert!(found[1].is_err());
    }
}
