//! Output files: opened before anything starts, so that a run is not lost for a wrong path.

use crate::decode::Decoded;
use crate::error::CliError;
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file that can be written. Dropped without having been written, it leaves nothing behind.
pub(crate) struct OutputFile {
    path: PathBuf,
    file: File,
    /// Whether it came into being here and holds nothing yet.
    remove: bool,
}

impl OutputFile {
    /// Opens without touching what the file holds.
    pub(crate) fn open(path: &Path) -> Result<Self, CliError> {
        let existed = path.exists();
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|source| CliError::File { verb: "write", path: path.into(), source })?;
        Ok(Self { path: path.into(), file, remove: !existed })
    }

    /// Replaces the contents.
    pub(crate) fn write(mut self, bytes: &[u8]) -> Result<(), CliError> {
        let failed = |source| CliError::File { verb: "write", path: self.path.clone(), source };
        if self.file.metadata().map_err(failed)?.is_file() {
            self.file.set_len(0).map_err(failed)?;
        }
        self.file.write_all(bytes).map_err(failed)?;
        self.remove = false;
        Ok(())
    }

    /// Writes `value` as one line of JSON.
    pub(crate) fn write_json(self, value: &impl Serialize) -> Result<(), CliError> {
        let mut text = serde_json::to_vec(value)
            .map_err(|error| CliError::failed(format!("cannot write {} as JSON: {error}", self.path.display())))?;
        text.push(b'\n');
        self.write(&text)
    }

    /// Writes `logits.<index>`, f32 `[new, vocab]`, of every sequence.
    pub(crate) fn write_logits(self, sequences: &[Decoded], vocab: usize) -> Result<(), CliError> {
        let failed = |error| CliError::failed(format!("cannot write the logits to {}: {error}", self.path.display()));
        let tensors = sequences
            .iter()
            .enumerate()
            .map(|(index, sequence)| {
                let shape = vec![sequence.tokens.len(), vocab];
                let view = TensorView::new(Dtype::F32, shape, &sequence.logits)?;
                Ok((format!("logits.{index}"), view))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed)?;
        let bytes = safetensors::serialize(tensors, None).map_err(failed)?;
        self.write(&bytes)
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if self.remove {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_not_written_is_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (new, old) = (dir.path().join("new"), dir.path().join("old"));
        std::fs::write(&old, "kept for the time being").unwrap();
        drop((OutputFile::open(&new).unwrap(), OutputFile::open(&old).unwrap()));
        assert!(!new.exists());
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "kept for the time being");
        OutputFile::open(&old).unwrap().write_json(&[1, 2]).unwrap();
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "[1,2]\n");
    }

    #[test]
    fn a_directory_is_refused_before_anything_starts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(OutputFile::open(dir.path()).err().unwrap().code(), 2);
        assert_eq!(OutputFile::open(&dir.path().join("no/such")).err().unwrap().code(), 2);
    }
}
