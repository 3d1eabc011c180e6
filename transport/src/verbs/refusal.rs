//! Why a device does not take memory, in words that say what to do.

use crate::TransportError;
use std::io;
use std::path::Path;

/// How the device was to reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Host memory, its pages locked.
    Locked,
    /// Host memory that this process may not write, its pages locked.
    ReadOnly,
    /// Host memory, its pages brought in when they are asked for.
    OnDemand,
    /// Device memory, by the dma-buf that it is exported as.
    DmaBuf,
    /// Device memory, by a kernel module of its device that resolves its addresses.
    PeerMemory,
}

/// One way that failed.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) way: Way,
    pub(super) source: io::Error,
}

/// What of this machine matters.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    /// The most bytes that this process may lock; none is no limit.
    locked_limit: Option<u64>,
    /// The peer-memory module that is loaded.
    peer_memory: Option<&'static str>,
}

/// Modules that let network devices reach the memory of others.
const PEER_MEMORY: [&str; 2] = ["nvidia_peermem", "nv_peer_mem"];

impl Machine {
    /// Asks the system.
    pub(super) fn look() -> Self {
        let loaded = |module: &&str| Path::new("/sys/module").join(module).exists();
        Self {
            locked_limit: rustix::process::getrlimit(rustix::process::Resource::Memlock).current,
            peer_memory: PEER_MEMORY.into_iter().find(loaded),
        }
    }
}

/// The error of memory that could be reached in no way; the first says most.
pub(super) fn explain(device: &str, bytes: usize, refusals: Vec<Refusal>, machine: &Machine) -> TransportError {
    let mut refusals = refusals.into_iter();
    let Some(Refusal { way, source }) = refusals.next() else {
        return TransportError::invalid(format!("no way to register {bytes} bytes with {device}"));
    };
    let memory = match way {
        Way::Locked => "host memory",
        Way::ReadOnly => "read-only host memory",
        Way::OnDemand => "host memory for on-demand paging",
        Way::DmaBuf => "device memory by its dma-buf",
        Way::PeerMemory => "device memory as peer memory, as it has no dma-buf",
    };
    let mut hint = advice(way, &source, machine);
    for Refusal { way, source } in refusals {
        hint = format!("{hint}; and as peer memory: {source}; {}", advice(way, &source, machine));
    }
    TransportError::Registration { device: device.into(), bytes, memory: memory.into(), source, hint }
}

/// What to do about a failure.
fn advice(way: Way, source: &io::Error, machine: &Machine) -> String {
    match (way, source.raw_os_error().unwrap_or_default()) {
        (Way::Locked | Way::ReadOnly, libc::ENOMEM | libc::EPERM | libc::EAGAIN) => locked(machine),
        (Way::ReadOnly, libc::EFAULT) => {
            "kernels before 6.2 lock no shared mapping that is read-only: map it for writing, and grant it for reading".into()
        }
        (Way::Locked | Way::OnDemand, libc::EFAULT) => {
            "not all of it is mapped, or it may not be written: is the file shorter than its mapping?".into()
        }
        (Way::OnDemand, _) => "the device or its driver does no on-demand paging: leave on_demand_paging off".into(),
        (Way::Locked | Way::ReadOnly, _) => "what the device takes is in `ibv_devinfo -v`: max_mr_size, max_mr".into(),
        (Way::DmaBuf, _) if source.kind() == io::ErrorKind::Unsupported && source.raw_os_error().is_none() => {
            "this libibverbs is too old for dma-buf: install rdma-core 34 or later".into()
        }
        (Way::DmaBuf, libc::EOPNOTSUPP | libc::ENOSYS | libc::EPROTONOSUPPORT | libc::ENOTTY) => {
            "the kernel (5.12 or later is needed) or the driver of the network device registers no dma-buf".into()
        }
        (Way::DmaBuf, libc::EPERM | libc::EACCES) => {
            "the dma-buf or a security policy does not let this process register it: is it exported for writing, and \
             may the process use both devices?"
                .into()
        }
        (Way::DmaBuf, libc::EBADF | libc::EINVAL) => {
            "the descriptor is no dma-buf, or does not hold the range: export the whole allocation, and name the offset \
             in it"
                .into()
        }
        (Way::DmaBuf, libc::ENOMEM) => format!("the window (BAR1) of the device may be full; {}", locked(machine)),
        (Way::DmaBuf, _) => {
            "the device's driver does not map the memory for the network device: use its open kernel modules, and check \
             that its window (BAR1) is large enough and the two are not kept apart by an IOMMU"
                .into()
        }
        (Way::PeerMemory, _) => match machine.peer_memory {
            None => "no peer-memory module is loaded: `modprobe nvidia_peermem`, which comes with NVIDIA's driver and \
                     wants the kernel modules of MLNX_OFED or DOCA-OFED"
                .into(),
            Some(module) => format!(
                "{module} is loaded, and does not know the address: is it of an allocation of the device that is still \
                 there, and not of a stream-ordered pool?"
            ),
        },
    }
}

fn locked(machine: &Machine) -> String {
    let Some(limit) = machine.locked_limit else {
        return "the locked memory of this process is not limited: the machine or the device has no more, register less"
            .into();
    };
    format!(
        "without CAP_IPC_LOCK this process may lock {} KiB, and each grant of a region counts again: raise the limit by \
         `ulimit -l unlimited` (systemd: LimitMEMLOCK=infinity, containers: --ulimit memlock=-1), or register less",
        limit / 1024
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARE: Machine = Machine { locked_limit: Some(65536), peer_memory: None };

    fn message(refusals: Vec<Refusal>, machine: &Machine) -> String {
        explain("mlx5_0", 4096, refusals, machine).to_string()
    }

    fn one(way: Way, errno: i32) -> Vec<Refusal> {
        vec![Refusal { way, source: io::Error::from_raw_os_error(errno) }]
    }

    #[track_caller]
    fn says(message: &str, all: &[&str]) {
        for part in all {
            assert!(message.contains(part), "`{message}` does not say `{part}`");
        }
    }

    #[test]
    fn a_limit_of_locked_memory_is_named_with_how_to_raise_it() {
        let small = message(one(Way::Locked, libc::ENOMEM), &BARE);
        says(&small, &["mlx5_0", "4096 bytes of host memory", "64 KiB", "ulimit -l unlimited", "LimitMEMLOCK"]);
        says(&message(one(Way::ReadOnly, libc::EPERM), &BARE), &["64 KiB"]);
        let unlimited = Machine { locked_limit: None, ..BARE };
        says(&message(one(Way::Locked, libc::ENOMEM), &unlimited), &["not limited", "register less"]);
    }

    #[test]
    fn device_memory_that_no_way_reaches_is_told_of_each() {
        let mut both = one(Way::DmaBuf, libc::EOPNOTSUPP);
        both.extend(one(Way::PeerMemory, libc::EFAULT));
        let without = message(both, &BARE);
        says(&without, &["device memory by its dma-buf", "5.12", "and as peer memory", "modprobe nvidia_peermem"]);
        let loaded = Machine { peer_memory: Some("nvidia_peermem"), ..BARE };
        let with = message(one(Way::PeerMemory, libc::EFAULT), &loaded);
        says(&with, &["as it has no dma-buf", "nvidia_peermem is loaded", "stream-ordered"]);
        assert!(!with.contains("modprobe"), "{with}");
    }

    #[test]
    fn each_failure_of_a_dma_buf_has_advice_of_its_own() {
        let missing = Refusal { way: Way::DmaBuf, source: io::Error::new(io::ErrorKind::Unsupported, "no call") };
        says(&message(vec![missing], &BARE), &["rdma-core 34"]);
        says(&message(one(Way::DmaBuf, libc::ENOSYS), &BARE), &["kernel (5.12"]);
        says(&message(one(Way::DmaBuf, libc::EPERM), &BARE), &["exported for writing"]);
        says(&message(one(Way::DmaBuf, libc::EINVAL), &BARE), &["no dma-buf"]);
        says(&message(one(Way::DmaBuf, libc::ENOMEM), &BARE), &["BAR1"]);
        says(&message(one(Way::DmaBuf, libc::EFAULT), &BARE), &["open kernel modules"]);
    }

    #[test]
    fn memory_that_is_not_there_or_not_writable_is_told_apart() {
        says(&message(one(Way::Locked, libc::EFAULT), &BARE), &["shorter than its mapping"]);
        says(&message(one(Way::ReadOnly, libc::EFAULT), &BARE), &["read-only host memory", "before 6.2"]);
    }

    #[test]
    fn on_demand_paging_that_a_device_lacks_is_to_be_left_off() {
        says(&message(one(Way::OnDemand, libc::EOPNOTSUPP), &BARE), &["leave on_demand_paging off"]);
        says(&message(one(Way::OnDemand, libc::EFAULT), &BARE), &["not all of it is mapped"]);
    }
}
