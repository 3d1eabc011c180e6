//! The cluster's token: read from a file or the environment, never shown.

use crate::error::CliError;
use serde::Deserialize;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use stepmesh_mesh::control::Token;

/// The largest token file that is read, in bytes.
const LARGEST_TOKEN: u64 = 4096;

/// A text that does not print itself.
#[derive(Deserialize, Clone, PartialEq, Eq)]
#[serde(transparent)]
pub(crate) struct Secret(String);

impl Secret {
    /// The text, for whoever must send it.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

/// The token as given, or the first line of the file; one of the two at most.
pub(crate) fn read_token(token: Option<&Secret>, file: Option<&Path>) -> Result<Option<Secret>, CliError> {
    let (text, origin) = match (token, file) {
        (None, None) => return Ok(None),
        (Some(_), Some(path)) => {
            return Err(CliError::input(
                format!("a token is given twice: as `token` and in the file {}", path.display()),
                "keep the file, drop STEPMESH_TOKEN or the `token` field",
            ));
        }
        (Some(secret), None) => (secret.0.clone(), "the token".to_owned()),
        (None, Some(path)) => (read_first_line(path)?, format!("the token in {}", path.display())),
    };
    match Token::new(&text) {
        Ok(_) => Ok(Some(Secret(text))),
        Err(error) => Err(CliError::input(
            format!("{origin} cannot be used: {error}"),
            "make one with: head -c 24 /dev/urandom | base64",
        )),
    }
}

fn read_first_line(path: &Path) -> Result<String, CliError> {
    let failed = |source| CliError::File { verb: "read", path: path.into(), source };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > LARGEST_TOKEN {
        let message = format!("{} is {length} bytes long, too much for a token", path.display());
        return Err(CliError::plain_input(message));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_the_first_line_of_its_file_and_never_printed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "s3cret\n").unwrap();
        let token = read_token(None, Some(&path)).unwrap().unwrap();
        assert_eq!(token.reveal(), "s3cret");
        assert_eq!(format!("{token:?}"), "(secret)");
    }

    #[test]
    fn a_token_that_cannot_be_sent_or_is_given_twice_is_refused_without_showing_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let given: Secret = "hush hush".parse().unwrap();
        std::fs::write(&path, "\n").unwrap();
        let refused = [
            read_token(None, Some(&path)).unwrap_err(),
            read_token(None, Some(&dir.path().join("absent"))).unwrap_err(),
            read_token(Some(&given), None).unwrap_err(),
            read_token(Some(&given), Some(&path)).unwrap_err(),
        ];
        for error in refused {
            assert_eq!(error.code(), 2);
            assert!(!error.to_string().contains("hush"), "{error}");
        }
    }
}
