//! Ours and the peers in turn.

use crate::BenchError;

/// What rounds of ours and a peer's took, a pair a round.
pub(super) type Rounds = Vec<[f64; 2]>;

/// So many rounds, ours and the peer's, of each peer; or why a peer has none. `round` takes ours, and then the peer's.
///
/// # Errors
/// When ours cannot be taken.
pub(super) fn take<P>(
    peers: &[P],
    rounds: usize,
    mut round: impl FnMut(&P) -> Result<(f64, Result<f64, BenchError>), BenchError>,
) -> Result<Vec<Result<Rounds, BenchError>>, BenchError> {
    let mut taken: Vec<_> = peers.iter().map(|_| Ok(Rounds::new())).collect();
    for _ in 0..rounds {
        for (peer, taken) in peers.iter().zip(&mut taken) {
            let Ok(pairs) = taken else { continue };
            match round(peer)? {
                (ours_us, Ok(theirs_us)) => pairs.push([ours_us, theirs_us]),
                (_, Err(error)) => *taken = Err(error),
            }
        }
    }
    Ok(taken)
}

/// The round whose ratio is the middle one: the machine is another from round to round, and the same, as far as that can be, within
/// one.
pub(super) fn middle(rounds: &[[f64; 2]]) -> [f64; 2] {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(|a, b| (a[0] / a[1]).total_cmp(&(b[0] / b[1])));
    sorted.get(sorted.len() / 2).copied().unwrap_or([f64::NAN; 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_is_kept_and_who_fails_is_not_asked_again() {
        let mut asked = Vec::new();
        let found = take(&["good", "bad"], 3, |&peer| {
            asked.push(peer);
            let turn = asked.len() as f64;
            Ok((turn, if peer == "good" { Ok(10.0 - turn) } else { Err(BenchError::Stopped) }))
        });
        let found = found.expect("ours");
        assert_eq!(asked, ["good", "bad", "good", "good"]);
        assert_eq!(found[0].as_ref().ok(), Some(&vec![[1.0, 9.0], [3.0, 7.0], [4.0, 6.0]]));
        assert!(found[1].is_err());
    }

    #[test]
    fn the_round_with_the_middle_ratio_counts() {
        assert_eq!(middle(&[[1.0, 10.0], [9.0, 1.0], [4.0, 5.0]]), [4.0, 5.0]);
        assert_eq!(middle(&[[2.0, 3.0]]), [2.0, 3.0]);
    }
}
