//! Lines on standard output and standard error that never panic when nobody reads them.

use crate::error::CliError;
use std::io::Write;

/// One line on standard output.
pub(crate) fn say(line: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(CliError::Output)
}

/// One line on standard error, for what cannot fail any further.
pub(crate) fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
