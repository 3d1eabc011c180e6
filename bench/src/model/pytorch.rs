//! PyTorch beside ours: the same model in one process.

use super::Decode;
use crate::BenchError;
use crate::process::Process;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The model that the small checkpoint was trained as, and what decodes with it.
const SCRIPT: &str = concat!(include_str!("../../../scripts/tiny/model.py"), "\n", include_str!("decode.py"));
/// How long one round may take: bf16 is slow on processors that do not have it.
const PATIENCE: Duration = Duration::from_secs(300);

/// What it is asked to compute in, as ours names them.
pub(super) const DTYPES: [&str; 2] = ["bf16", "f32"];

/// An interpreter that has it, and a checkpoint.
#[derive(Clone, Debug)]
pub struct PyTorch {
    python: PathBuf,
    checkpoint: PathBuf,
    pub(super) version: String,
}

#[derive(Deserialize)]
struct Said {
    tokens_per_s: f64,
}

impl PyTorch {
    /// That of `python`, if it has it; it reads the model from the directory `checkpoint`.
    pub fn find(python: &Path, checkpoint: &Path) -> Option<Self> {
        let output = Command::new(python).args(["-c", SCRIPT, "version"]).output().ok()?;
        let version = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
        Some(Self { python: python.into(), checkpoint: checkpoint.into(), version: version.trim().to_owned() })
    }

    pub(super) fn tokens_per_s(&self, dtype: &str, threads: usize, of: &Decode) -> Result<f64, BenchError> {
        let mut command = Command::new(&self.python);
        command.args(["-c", SCRIPT, "run"]).arg(&self.checkpoint).arg(dtype);
        command.args([threads, of.batch, of.prompt_tokens, of.new_tokens].map(|number| number.to_string()));
        let said = Process::start(&mut command)?.finish(Instant::now() + PATIENCE)?;
        let figures = said.lines().rev().find_map(|line| serde_json::from_str::<Said>(line).ok());
        figures.map(|said| said.tokens_per_s).filter(|rate| *rate > 0.0).ok_or_else(|| BenchError::Peer {
            peer: "pytorch".into(),
            reason: format!("no figures in what it says: {}", said.trim()),
        })
    }
}
