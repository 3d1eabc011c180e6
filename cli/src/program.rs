//! Finds this very program, to start it again in another role.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const SELF: &str = "/proc/self/exe";

/// A path that starts this program: its own where that still is this program, so that process lists show its name;
/// else the kernel's, which outlives a replaced or deleted file.
pub(crate) fn path() -> PathBuf {
    let identity = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    match std::env::current_exe() {
        Ok(path) if identity(&path).is_some() && identity(&path) == identity(Path::new(SELF)) => path,
        _ => SELF.into(),
    }
}

/// The name that process lists show.
pub(crate) fn name() -> OsString {
    match path() {
        path if path == Path::new(SELF) => std::env::args_os().next().unwrap_or_else(|| "stepmesh".into()),
        path => path.into_os_string(),
    }
}
