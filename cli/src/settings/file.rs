//! Reads a role's TOML file; an error names the file, the line and the field.

use super::Layer;
use crate::error::CliError;
use std::path::Path;

/// The layer that `path` holds.
pub(super) fn read<L: Layer>(path: &Path) -> Result<L, CliError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| CliError::File { verb: "read", path: path.into(), source })?;
    parse(&text, path)
}

fn parse<L: Layer>(text: &str, path: &Path) -> Result<L, CliError> {
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
        let key = text.lines().nth(line - 1).and_then(|line| line.split_once('=')).map(|(key, _)| key.trim());
        let (message, hint) = explain(error.message(), key);
        CliError::Config { file: path.into(), line, message, hint }
    })
}

/// Says which field is meant; the list of what is allowed, which may be long, goes into the hint.
fn explain(message: &str, key: Option<&str>) -> (String, Option<String>) {
    let (what, allowed) = match message.split_once(", expected ") {
        Some((what, allowed)) if what.starts_with("unknown field") => {
            return (what.into(), Some(format!("known fields: {}", allowed.trim_start_matches("one of "))));
        }
        Some((what, allowed)) => (what, Some(format!("expected {allowed}"))),
        None => (message, None),
    };
    let is_value = what.starts_with("invalid ") || what.starts_with("unknown variant") || what.contains("is not a");
    match key {
        Some(key) if is_value => (format!("field `{key}`: {what}"), allowed),
        _ => (what.lines().collect::<Vec<_>>().join(" "), allowed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{AttentionLayer, FfnLayer};

    fn refuse<L: Layer + std::fmt::Debug>(text: &str) -> String {
        let error = parse::<L>(text, Path::new("role.toml")).unwrap_err();
        assert_eq!(error.code(), 2);
        error.to_string()
    }

    #[test]
    fn an_unknown_field_is_named_with_file_and_line() {
        let message = refuse::<AttentionLayer>("rank = 0\n\nrankk = 1\n");
        assert_eq!(message, "role.toml, line 3: unknown field `rankk`");
    }

    #[test]
    fn a_wrong_type_or_value_names_the_field() {
        let cases = [
            ("rank = \"one\"", "field `rank`: invalid type: string \"one\""),
            ("microbatches = -1", "field `microbatches`: invalid value: integer `-1`"),
            ("microbatches = 0", "field `microbatches`: invalid value: integer `0`"),
            ("transport = \"mem\"", "field `transport`: unknown variant `mem`"),
            ("policy = \"most\"", "field `policy`: `most` is not a policy"),
            ("address = \"somewhere\"", "field `address`"),
        ];
        for (text, expected) in cases {
            let message = refuse::<FfnLayer>(text);
            assert!(message.contains(expected) && message.starts_with("role.toml, line 1: "), "{message}");
        }
    }

    #[test]
    fn what_is_not_toml_is_refused_on_its_line() {
        let message = refuse::<FfnLayer>("rank = 1\nrank 2\n");
        assert!(message.starts_with("role.toml, line 2: "), "{message}");
    }
}
