//! Libraries of CUDA's toolkit, which are loaded when they are first needed, and which a machine may not have.

use std::path::PathBuf;

use libloading::Library;

use crate::ModelError;

/// The first of these that is there; what the environment's `variable` names comes before them.
pub(super) fn open(variable: &str, names: &[&str]) -> Result<Library, String> {
    let chosen = std::env::var(variable).ok();
    let mut last = String::new();
    for name in chosen.iter().map(String::as_str).chain(names.iter().copied()) {
        // SAFETY: loading a library of the toolkit runs its initialisers, which is what it is for.
        match unsafe { Library::new(name) } {
            Ok(library) => return Ok(library),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

/// Loads, for good, what lies beside the file that the environment's `variable` names and begins with `prefix`: libraries that the
/// one named asks for without saying where they are.
pub(super) fn open_beside(variable: &str, prefix: &str) {
    let Some(chosen) = std::env::var_os(variable).map(PathBuf::from) else { return };
    let Some(directory) = chosen.parent().filter(|directory| directory.is_absolute()) else { return };
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            // SAFETY: as above; it stays.
            if let Ok(library) = unsafe { Library::new(entry.path()) } {
                std::mem::forget(library);
            }
        }
    }
}

/// A function of a library.
///
/// # Safety
/// It is of this type, and is not called once the library is gone.
pub(super) unsafe fn find<T: Copy>(library: &Library, name: &'static [u8]) -> Result<T, ModelError> {
    // SAFETY: the caller's promise.
    let symbol = unsafe { library.get::<T>(name) };
    symbol.map(|symbol| *symbol).map_err(|error| ModelError::Kernels { reason: error.to_string() })
}
