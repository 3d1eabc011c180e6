//! The files that the kernel shows (`/proc`, `/sys`, `/dev`), below a root that tests can choose.

use std::path::{Path, PathBuf};

/// A view of the kernel's files.
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    pub(super) fn of_this_machine() -> Self {
        Self::new(Path::new("/"))
    }

    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.into() }
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// A file's text without the blanks around it; none when it cannot be read.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        let bytes = std::fs::read(self.path(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The names in a directory in order; none when it cannot be read.
    pub(super) fn names(&self, path: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        // Numbers within names count as numbers: node2 before node10.
        names.sort_by_key(|name| (name.len(), name.clone()));
        names
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }
}
