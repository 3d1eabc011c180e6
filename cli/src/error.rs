//! Why a command did not succeed: one line that names the thing, a hint what to do, and an exit code.

use std::path::PathBuf;
use std::process::ExitCode;
use thiserror::Error;

/// Every way in which a command ends badly.
#[derive(Debug, Error)]
pub(crate) enum CliError {
    /// What the user gave cannot be honoured.
    #[error("{message}")]
    Input { message: String, hint: Option<String> },
    /// A configuration file is wrong at a line.
    #[error("{}, line {line}: {message}", file.display())]
    Config { file: PathBuf, line: usize, message: String, hint: Option<String> },
    /// A file that the user named cannot be read or written.
    #[error("cannot {verb} {}: {source}", path.display())]
    File { verb: &'static str, path: PathBuf, source: std::io::Error },
    /// A process of the deployment ended, or never came up.
    #[error("{message}")]
    Lost { message: String, code: u8 },
    /// The deployment or its scheduler answers, but not as asked.
    #[error("{message}")]
    Failed { message: String, hint: Option<String> },
    /// The system refused something that every machine should give.
    #[error("cannot {doing}: {source}")]
    System { doing: &'static str, source: std::io::Error },
    /// Nobody reads what is printed.
    #[error("cannot print: {0}")]
    Output(std::io::Error),
    /// Ctrl-C or SIGTERM before the work was done.
    #[error("interrupted")]
    Interrupted,
}

impl CliError {
    /// Bad input, with what to do about it.
    pub(crate) fn input(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Input { message: message.into(), hint: Some(hint.into()) }
    }

    /// Bad input whose message says it all.
    pub(crate) fn plain_input(message: impl Into<String>) -> Self {
        Self::Input { message: message.into(), hint: None }
    }

    /// A failure whose message says it all.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::Failed { message: message.into(), hint: None }
    }

    /// For `map_err` on what the system refuses.
    pub(crate) fn system(doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::System { doing, source }
    }

    /// 2: the input must change; 130: interrupted; 1: everything else.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Input { .. } | Self::Config { .. } | Self::File { .. } => 2,
            Self::Lost { code, .. } => *code,
            Self::Interrupted => 130,
            Self::Failed { .. } | Self::System { .. } | Self::Output(_) => 1,
        }
    }

    /// The same about one of several sequences.
    pub(crate) fn of_sequence(self, index: usize) -> Self {
        let of = |message| format!("sequence {index}: {message}");
        match self {
            Self::Input { message, hint } => Self::Input { message: of(message), hint },
            Self::Failed { message, hint } => Self::Failed { message: of(message), hint },
            other => other,
        }
    }

    fn hint(&self) -> Option<&str> {
        match self {
            Self::Input { hint, .. } | Self::Config { hint, .. } | Self::Failed { hint, .. } => hint.as_deref(),
            _ => None,
        }
    }

    /// Says it on standard error and gives the exit code. A reader that went away is not worth a word.
    pub(crate) fn report(&self) -> ExitCode {
        let gone = matches!(self, Self::Output(error) if error.kind() == std::io::ErrorKind::BrokenPipe);
        if !gone {
            crate::output::complain(&format!("error: {self}"));
            if let Some(hint) = self.hint() {
                crate::output::complain(&format!("  hint: {hint}"));
            }
        }
        ExitCode::from(self.code())
    }
}
