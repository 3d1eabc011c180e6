//! Text as it grows: tokens in, whole characters out.

use super::Text;
use crate::ModelError;

/// A character of UTF-8 has 4 bytes at most, so that no more tokens can be missing from one.
const MOST_HELD: usize = 4;

/// Turns the tokens of one sequence into text, piece by piece, and never splits a character.
#[derive(Debug, Default, Clone)]
pub struct Detokenizer {
    /// Tokens whose text was given out last, for those that follow may depend on them; then those held back.
    tokens: Vec<u32>,
    given: usize,
}

impl Detokenizer {
    /// The text that `token` adds; empty while a character is incomplete.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the tokenizer fails.
    pub fn push(&mut self, text: &Text, token: u32) -> Result<String, ModelError> {
        self.tokens.push(token);
        let held = self.tokens.len() - self.given;
        let all = text.decode(&self.tokens)?;
        if all.ends_with(char::REPLACEMENT_CHARACTER) && held < MOST_HELD {
            return Ok(String::new());
        }
        self.give(text, &all)
    }

    /// What is held back, at the sequence's end: an incomplete character comes as U+FFFD.
    ///
    /// # Errors
    /// As [`Detokenizer::push`].
    pub fn finish(&mut self, text: &Text) -> Result<String, ModelError> {
        if self.tokens.len() == self.given {
            return Ok(String::new());
        }
        let all = text.decode(&self.tokens)?;
        self.give(text, &all)
    }

    fn give(&mut self, text: &Text, all: &str) -> Result<String, ModelError> {
        let before = text.decode(&self.tokens[..self.given])?;
        let added = match all.strip_prefix(before.as_str()) {
            Some(added) => added.to_owned(),
            None => text.decode(&self.tokens[self.given..])?,
        };
        self.tokens.drain(..self.given);
        self.given = self.tokens.len();
        Ok(added)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::byte_tokenizer;
    use super::*;
    use proptest::prelude::*;

    fn pieces(tokens: &[u32]) -> Vec<String> {
        let text = byte_tokenizer();
        let mut stream = Detokenizer::default();
        let mut pieces: Vec<String> = tokens.iter().map(|token| stream.push(&text, *token).unwrap()).collect();
        pieces.push(stream.finish(&text).unwrap());
        pieces
    }

    #[test]
    fn a_character_comes_whole_with_its_last_byte() {
        let tokens: Vec<u32> = "é🦀!".bytes().map(u32::from).collect();
        assert_eq!(pieces(&tokens), ["", "é", "", "", "", "🦀", "!", ""]);
    }

    #[test]
    fn an_incomplete_character_is_given_up_at_the_end() {
        assert_eq!(pieces(&[97, 0xf0, 0x9f]), ["a", "", "", "\u{fffd}"]);
        assert_eq!(pieces(&[97, 257]), ["a", "", ""], "an end token has no text");
    }

    proptest! {
        #[test]
        fn pieces_make_up_the_whole_text(sample in "\\PC{0,40}") {
            // The replacement character itself cannot be told from an incomplete one.
            let sample = sample.replace(char::REPLACEMENT_CHARACTER, "");
            let tokens: Vec<u32> = sample.bytes().map(u32::from).collect();
            prop_assert_eq!(pieces(&tokens).concat(), sample);
        }

        #[test]
        fn nothing_is_held_for_long_whatever_comes(tokens in prop::collection::vec(0u32..256, 0..60)) {
            let empty = pieces(&tokens).iter().rev().skip(1).map(String::is_empty).fold((0usize, 0usize), |(run, most), empty| {
                let run = if empty { run + 1 } else { 0 };
                (run, most.max(run))
            });
            prop_assert!(empty.1 < MOST_HELD, "{:?}", pieces(&tokens));
        }
    }
}
