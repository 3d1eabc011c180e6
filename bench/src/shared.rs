//! Memory that processes share: words of one kind, mapped by whoever needs them.

use crate::BenchError;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fs::File;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// What can be shared so.
///
/// # Safety
/// It is made of atomics, any bits of which are values, and its layout is `repr(C)`.
pub(crate) unsafe trait Common: Sync {}

/// Words that are all zero at first, for whoever has a clone, and for processes that open the same file.
pub(crate) struct Shared<T: Common>(Arc<Mapping<T>>);

struct Mapping<T> {
    words: NonNull<T>,
    file: OwnedFd,
    kind: PhantomData<T>,
}

// SAFETY: the words are atomics, which any thread may use.
unsafe impl<T: Common> Send for Mapping<T> {}
// SAFETY: as above.
unsafe impl<T: Common> Sync for Mapping<T> {}

impl<T: Common> Shared<T> {
    /// A new one.
    pub(crate) fn new() -> Result<Self, BenchError> {
        let failed = BenchError::system("making memory that processes share");
        let make = || {
            let file = memfd_create(c"stepmesh-bench", MemfdFlags::CLOEXEC)?;
            ftruncate(&file, size_of::<T>() as u64)?;
            Ok::<_, rustix::io::Errno>(file)
        };
        Self::map(make().map_err(failed)?)
    }

    /// That of another process.
    pub(crate) fn open(path: &Path) -> Result<Self, BenchError> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(BenchError::system("opening the memory of the process that measures"))?;
        let held = file.metadata().map_err(BenchError::system("looking at that memory"))?.len();
        if held != size_of::<T>() as u64 {
            let reason = format!("{held} bytes are not what this release shares");
            return Err(BenchError::Peer { peer: path.display().to_string(), reason });
        }
        Self::map(file.into())
    }

    fn map(file: OwnedFd) -> Result<Self, BenchError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a file that is as long and never shortened.
        let words = unsafe { mmap(ptr::null_mut(), size_of::<T>(), protection, MapFlags::SHARED, &file, 0) };
        let words = words.map_err(BenchError::system("mapping memory that processes share"))?;
        let words = NonNull::new(words.cast()).ok_or(BenchError::Thread)?;
        Ok(Self(Arc::new(Mapping { words, file, kind: PhantomData })))
    }

    /// Where another process finds it, while this one lives.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.file.as_raw_fd()).into()
    }
}

impl<T: Common> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Common> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: mapped for as long as this lives, page-aligned, and any bits are words of this kind.
        unsafe { self.0.words.as_ref() }
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: mapped once, and nobody refers to it any more.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), size_of::<T>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[repr(C)]
    struct Two {
        words: [AtomicU64; 2],
    }

    // SAFETY: atomics only.
    unsafe impl Common for Two {}

    #[test]
    fn what_one_mapping_stores_another_loads() {
        let ours = Shared::<Two>::new().expect("memory");
        let theirs = Shared::<Two>::open(&ours.path()).expect("the same memory");
        ours.words[1].store(7, Ordering::Release);
        assert_eq!([0, 1].map(|word: usize| theirs.words[word].load(Ordering::Acquire)), [0, 7]);
    }

    #[test]
    fn memory_of_another_size_is_refused() {
        let other = std::env::current_exe().expect("this program");
        assert!(Shared::<Two>::open(&other).is_err() && Shared::<Two>::open(Path::new("/nowhere")).is_err());
    }
}
