//! Shared memory, locked memory, open files.

use super::tree::Tree;
use super::{Finding, Verdict};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create, statvfs};
use rustix::process::{Resource, getrlimit};

/// What one process of a small deployment opens comfortably.
const FEW_FILES: u64 = 1024;
/// Registered memory that a daemon may want.
const MUCH_MEMORY: u64 = 4 << 30;

pub(super) fn examine(tree: &Tree) -> Vec<Finding> {
    vec![memory(tree), shared_memory(), dev_shm(tree), locked_memory(), open_files()]
}

fn memory(tree: &Tree) -> Finding {
    let info = tree.text("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    match (kib("MemTotal:"), kib("MemAvailable:")) {
        (Some(total), Some(free)) => {
            Finding::ok("memory", format!("{} in all, {} available", size(total << 10), size(free << 10)))
        }
        _ => Finding::note("memory", "unknown", "/proc/meminfo cannot be read; is /proc mounted?"),
    }
}

/// `shm` regions are sealed memfds: try one.
fn shared_memory() -> Finding {
    let tried = memfd_create("stepmesh-doctor", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .and_then(|file| ftruncate(&file, 1 << 20));
    match tried {
        Ok(()) => Finding::ok("shared memory", "memfd works"),
        Err(error) => Finding::lack(
            "shared memory",
            format!("memfd_create fails: {error}"),
            "allow memfd_create in the container's seccomp profile, or use --transport tcp",
        ),
    }
}

fn dev_shm(tree: &Tree) -> Finding {
    match statvfs(tree.path("/dev/shm")) {
        Ok(stat) => {
            let [total, free] = [stat.f_blocks, stat.f_bavail].map(|blocks| blocks.saturating_mul(stat.f_frsize));
            Finding::ok(
                "/dev/shm",
                format!("{} in all, {} free (the shm transport does not use it)", size(total), size(free)),
            )
        }
        Err(_) => Finding::note("/dev/shm", "not mounted", "nothing to do: the shm transport uses memfds"),
    }
}

fn locked_memory() -> Finding {
    let limit = getrlimit(Resource::Memlock);
    match limit.current {
        None => Finding::ok("locked memory", "unlimited"),
        Some(bytes) if bytes >= MUCH_MEMORY => Finding::ok("locked memory", format!("limit {}", size(bytes))),
        Some(bytes) => Finding {
            area: "locked memory",
            verdict: Verdict::Note,
            found: format!("limit {}", size(bytes)),
            advice: Some(
                "shm and tcp lock nothing; RDMA registers its buffers: set `ulimit -l unlimited`, LimitMEMLOCK=infinity \
                 in the unit, or --ulimit memlock=-1 for the container"
                    .into(),
            ),
        },
    }
}

fn open_files() -> Finding {
    let limit = getrlimit(Resource::Nofile);
    match limit.current {
        Some(files) if files < FEW_FILES => Finding::lack(
            "open files",
            format!("limit {files}"),
            format!("set `ulimit -n {FEW_FILES}` or more: each link takes a few descriptors"),
        ),
        Some(files) => Finding::ok("open files", format!("limit {files}")),
        None => Finding::ok("open files", "unlimited"),
    }
}

fn size(bytes: u64) -> String {
    crate::units::bytes(bytes)
}
