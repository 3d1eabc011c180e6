//! `stepmesh doctor`: what this machine has, and what to do about what it lacks.

mod gpu;
mod limits;
mod processor;
mod rdma;
mod tree;

use crate::error::CliError;
use crate::output::say;
use serde::Serialize;
use tree::Tree;

/// How a finding is to be taken.
#[derive(Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// Works, but worth knowing.
    Note,
    /// Something does not work without it.
    Lack,
}

/// One line of the report.
#[derive(Serialize, Clone, Debug)]
pub(crate) struct Finding {
    area: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn ok(area: &'static str, found: impl Into<String>) -> Self {
        Self { area, verdict: Verdict::Ok, found: found.into(), advice: None }
    }

    fn note(area: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { area, verdict: Verdict::Note, found: found.into(), advice: Some(advice.into()) }
    }

    fn lack(area: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { area, verdict: Verdict::Lack, found: found.into(), advice: Some(advice.into()) }
    }
}

/// What `doctor` is asked.
#[derive(clap::Args, Debug)]
pub(crate) struct DoctorArguments {
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// Looks and prints. A lack is a finding, not a failure.
pub(crate) fn run(arguments: &DoctorArguments) -> Result<(), CliError> {
    let findings = examine(&Tree::of_this_machine());
    if arguments.json {
        let text = serde_json::to_string_pretty(&findings)
            .map_err(|error| CliError::failed(format!("cannot write JSON: {error}")))?;
        return say(&text);
    }
    findings.iter().try_for_each(|finding| {
        let mark = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Note => "note",
            Verdict::Lack => "lack",
        };
        say(&format!("{mark:<4}  {:<13}  {}", finding.area, finding.found))?;
        finding.advice.iter().try_for_each(|advice| say(&format!("{:<21}→ {advice}", "")))
    })?;
    say("")?;
    say(&summary(&findings))
}

fn examine(tree: &Tree) -> Vec<Finding> {
    let mut findings = processor::examine(tree);
    findings.extend(limits::examine(tree));
    findings.extend(gpu::examine(tree));
    findings.extend(rdma::examine(tree));
    findings
}

fn summary(findings: &[Finding]) -> String {
    let lacks = |areas: &[&str]| {
        findings.iter().any(|finding| finding.verdict == Verdict::Lack && areas.contains(&finding.area))
    };
    let word = |lacking: bool| if lacking { "no" } else { "yes" };
    format!(
        "This machine can run: shm {} · tcp yes · RDMA hardware {} · GPU {}",
        word(lacks(&["shared memory"])),
        word(lacks(&["RDMA"])),
        word(lacks(&["GPU", "CUDA driver"])),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_machine_is_told_what_to_do_about_each_lack() {
        let root = tempfile::tempdir().unwrap();
        let findings = examine(&Tree::new(root.path()));
        assert!(findings.iter().any(|finding| finding.area == "RDMA" && finding.verdict == Verdict::Lack));
        assert!(findings.iter().any(|finding| finding.area == "GPU" && finding.verdict == Verdict::Lack));
        for finding in findings {
            assert_eq!(finding.verdict == Verdict::Ok, finding.advice.is_none(), "{finding:?}");
        }
    }
}
