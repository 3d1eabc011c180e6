//! Stop strings: text goes out as soon as it cannot be the beginning of one, and never a part of one.

/// Looks for stop strings in the text of one choice.
#[derive(Debug, Default)]
pub(super) struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// What may go out now that `piece` has come, and whether a stop string was found, which is where the text ends.
    pub(super) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, at the end.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filtered(stops: &[String], pieces: &[String]) -> (Vec<String>, bool) {
        let mut filter = StopFilter::new(stops.to_vec());
        let mut out = Vec::new();
        for piece in pieces {
            let (text, stopped) = filter.push(piece);
            out.push(text);
            if stopped {
                return (out, true);
            }
        }
        out.push(filter.finish());
        (out, false)
    }

    #[test]
    fn text_that_may_begin_a_stop_string_waits_for_what_follows() {
        let (out, stopped) = filtered(&["END".into()], &["the E".into(), "N".into(), "D of".into()]);
        assert_eq!((out.concat().as_str(), stopped), ("the ", true));
        let (out, stopped) = filtered(&["END".into()], &["the E".into(), "NT".into(), "ry E".into()]);
        assert_eq!((out, stopped), (vec!["the ".into(), "ENT".into(), "ry ".into(), "E".into()], false));
    }

    proptest! {
        #[test]
        fn the_text_ends_before_the_first_stop_string_however_it_is_cut(
            pieces in prop::collection::vec("[abü]{0,3}", 0..12),
            stops in prop::collection::vec("[abü]{1,3}", 0..3),
        ) {
            let whole = pieces.concat();
            let (out, stopped) = filtered(&stops, &pieces);
            // A longer stop string that is complete only later does not hide a shorter one before it.
            let ends: Vec<usize> = stops.iter().filter_map(|stop| whole.find(stop.as_str())).collect();
            prop_assert_eq!(stopped, !ends.is_empty());
            if !stopped {
                prop_assert_eq!(out.concat(), whole);
            } else {
                prop_assert!(whole.starts_with(&out.concat()));
                prop_assert!(stops.iter().all(|stop| !out.concat().contains(stop.as_str())));
            }
        }
    }
}
