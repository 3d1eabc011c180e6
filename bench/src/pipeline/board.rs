//! What the two sides of a run have in common, in memory that two processes can share: how long stages take, how long they
//! have taken and what CPU time, and when what is on the wire was posted.

use crate::BenchError;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fs::File;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Immediates of one direction that may be under way: more than there are microbatches.
const UNDER_WAY: usize = 64;

/// Words that both sides read and write. All are zero at first.
#[repr(C)]
pub(super) struct Words {
    /// Not zero: the run is over.
    pub(super) over: AtomicU64,
    /// What a stage takes, and has taken, in nanoseconds: attention, FFN.
    pub(super) stage_ns: [AtomicU64; 2],
    pub(super) busy_ns: [AtomicU64; 2],
    /// CPU time that the threads of the stages have used, in nanoseconds.
    pub(super) cpu_ns: [AtomicU64; 2],
    pub(super) ways: [Way; 2],
}

/// One direction of the wire between two ends with one link of one lane: when each immediate was posted, in order, by the
/// clock of its sender.
#[repr(C, align(64))]
pub(super) struct Way {
    pub(super) latency_ns: AtomicU64,
    posted: AtomicU64,
    taken: AtomicU64,
    posted_ns: [AtomicU64; UNDER_WAY],
}

impl Way {
    /// Sender: so many immediates are posted now. False if there is no room to note them.
    pub(super) fn post(&self, count: usize, now_ns: u64) -> bool {
        let posted = self.posted.load(Ordering::Relaxed);
        if posted - self.taken.load(Ordering::Acquire) + count as u64 > UNDER_WAY as u64 {
            return false;
        }
        for index in posted..posted + count as u64 {
            self.posted_ns[index as usize % UNDER_WAY].store(now_ns, Ordering::Relaxed);
        }
        self.posted.store(posted + count as u64, Ordering::Release);
        true
    }

    /// Sender: the last so many were not posted after all, so the receiver has not heard of them.
    pub(super) fn take_back(&self, count: usize) {
        self.posted.fetch_sub(count as u64, Ordering::Release);
    }

    /// Receiver: when the oldest that is under way was posted.
    pub(super) fn oldest_ns(&self) -> Option<u64> {
        let taken = self.taken.load(Ordering::Relaxed);
        (taken < self.posted.load(Ordering::Acquire))
            .then(|| self.posted_ns[taken as usize % UNDER_WAY].load(Ordering::Relaxed))
    }

    /// Receiver: the oldest has arrived.
    pub(super) fn take(&self) {
        self.taken.fetch_add(1, Ordering::Release);
    }
}

/// The words, shared by whoever has a clone, and by processes that open the same file.
#[derive(Clone)]
pub(super) struct Board(Arc<Mapping>);

struct Mapping {
    words: NonNull<Words>,
    file: OwnedFd,
}

// SAFETY: the words are atomics, which any thread may use.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Board {
    /// A new one.
    pub(super) fn new() -> Result<Self, BenchError> {
        let failed = BenchError::system("making memory that processes share");
        let make = || {
            let file = memfd_create(c"stepmesh-bench", MemfdFlags::CLOEXEC)?;
            ftruncate(&file, size_of::<Words>() as u64)?;
            Ok::<_, rustix::io::Errno>(file)
        };
        Self::map(make().map_err(failed)?)
    }

    /// That of another process.
    pub(super) fn open(path: &Path) -> Result<Self, BenchError> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(BenchError::system("opening the memory of the process that measures"))?;
        let held = file.metadata().map_err(BenchError::system("looking at that memory"))?.len();
        if held != size_of::<Words>() as u64 {
            return Err(BenchError::Peer {
                peer: path.display().to_string(),
                reason: format!("{held} bytes are not what this release shares"),
            });
        }
        Self::map(file.into())
    }

    fn map(file: OwnedFd) -> Result<Self, BenchError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a file that is as long and never shortened.
        let words = unsafe { mmap(ptr::null_mut(), size_of::<Words>(), protection, MapFlags::SHARED, &file, 0) };
        let words = words.map_err(BenchError::system("mapping memory that processes share"))?;
        let words = NonNull::new(words.cast()).ok_or(BenchError::Thread)?;
        Ok(Self(Arc::new(Mapping { words, file })))
    }

    /// Where another process finds it, while this one lives.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.file.as_raw_fd()).into()
    }
}

impl Deref for Board {
    type Target = Words;

    fn deref(&self) -> &Words {
        // SAFETY: mapped for as long as this lives, page-aligned, and any bits are atomics.
        unsafe { self.0.words.as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped once, and nobody refers to it any more.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), size_of::<Words>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_mapping_posts_the_other_takes_in_order_and_no_more_than_fits() {
        let ours = Board::new().expect("memory");
        let theirs = Board::open(&ours.path()).expect("the same memory");
        for round in 0..3 {
            for now_ns in 0..UNDER_WAY as u64 {
                assert!(ours.ways[0].post(1, round * 1000 + now_ns));
            }
            assert!(!ours.ways[0].post(1, 0), "full");
            ours.ways[0].take_back(1);
            for now_ns in 0..UNDER_WAY as u64 - 1 {
                assert_eq!(theirs.ways[0].oldest_ns(), Some(round * 1000 + now_ns));
                theirs.ways[0].take();
            }
            assert_eq!((theirs.ways[0].oldest_ns(), theirs.ways[1].oldest_ns()), (None, None));
        }
    }

    #[test]
    fn memory_of_another_size_is_refused() {
        let other = std::env::current_exe().expect("this program");
        assert!(Board::open(&other).is_err() && Board::open(Path::new("/nowhere")).is_err());
    }
}
