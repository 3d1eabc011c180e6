//! The shared token: shown to the scheduler with every call, printed nowhere.

use std::fmt;
use std::hint::black_box;
use thiserror::Error;

/// The longest token, in bytes.
const MAX_BYTES: usize = 4096;

/// A secret that members, clients and the scheduler share. Its `Debug` does not show it.
#[derive(Clone)]
pub struct Token(String);

/// Why a text cannot be a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a token has 1 to {MAX_BYTES} visible ASCII characters and no spaces")]
pub struct TokenError;

impl Token {
    /// Takes a text as a token. White space around it, such as a file's last newline, does not count.
    pub fn new(text: impl AsRef<str>) -> Result<Self, TokenError> {
        let text = text.as_ref().trim();
        let fits = (1..=MAX_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        if fits { Ok(Self(text.to_owned())) } else { Err(TokenError) }
    }

    /// The value of the `authorization` header.
    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Whether an `authorization` header shows this token. The time it takes tells its length at most.
    pub(crate) fn matches(&self, header: &[u8]) -> bool {
        let expected = self.header();
        let differing = expected.bytes().zip(header).fold(0, |differing, (a, b)| black_box(differing | (a ^ b)));
        header.len() == expected.len() && differing == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_matches_itself_only() {
        let token = Token::new("swordfish\n").unwrap();
        assert!(token.matches(b"Bearer swordfish"));
        for other in [&b"Bearer swordfisi"[..], b"Bearer swordfis", b"Bearer swordfishh", b"swordfish", b""] {
            assert!(!token.matches(other), "{other:?}");
        }
    }

    #[test]
    fn a_token_is_visible_text_that_debug_does_not_show() {
        assert!(["", " ", "two words", "größe"].iter().all(|text| Token::new(text).is_err()));
        assert!(!format!("{:?}", Token::new("swordfish").unwrap()).contains("swordfish"));
    }
}
