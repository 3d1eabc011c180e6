//! NVIDIA GPUs and the CUDA driver, learnt from files: nothing is loaded.

use super::Finding;
use super::tree::Tree;

/// Where distributions and containers put the driver's library.
const LIBRARY_DIRECTORIES: [&str; 8] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/lib64",
    "/usr/local/lib",
    "/usr/local/nvidia/lib64",
    "/usr/lib/wsl/lib",
];

pub(super) fn examine(tree: &Tree) -> Vec<Finding> {
    let mut findings = gpus(tree);
    let present = !tree.names("/proc/driver/nvidia/gpus").is_empty();
    findings.push(driver(tree, present));
    if present {
        findings.push(peer_memory(tree));
    }
    findings
}

fn gpus(tree: &Tree) -> Vec<Finding> {
    let base = "/proc/driver/nvidia/gpus";
    let gpus = tree.names(base);
    if gpus.is_empty() {
        let (found, advice) = if has_nvidia_hardware(tree) {
            ("an NVIDIA device on the PCI bus, but no driver for it", "install the NVIDIA kernel driver")
        } else {
            ("no NVIDIA GPU", "none is needed: attention and FFN run on the CPU")
        };
        return vec![Finding::lack("GPU", found, advice)];
    }
    gpus.into_iter()
        .map(|address| {
            let information = tree.text(&format!("{base}/{address}/information")).unwrap_or_default();
            let model = information.lines().find_map(|line| line.strip_prefix("Model:")).unwrap_or("unknown").trim();
            let node = tree.text(&format!("/sys/bus/pci/devices/{address}/numa_node")).unwrap_or_default();
            match node.parse::<u32>() {
                Ok(node) => Finding::ok("GPU", format!("{model} at {address}, NUMA node {node}")),
                Err(_) => Finding::ok("GPU", format!("{model} at {address}")),
            }
        })
        .collect()
}

fn has_nvidia_hardware(tree: &Tree) -> bool {
    let base = "/sys/bus/pci/devices";
    tree.names(base).iter().any(|device| {
        let read = |file: &str| tree.text(&format!("{base}/{device}/{file}")).unwrap_or_default();
        read("vendor") == "0x10de" && read("class").starts_with("0x03")
    })
}

fn driver(tree: &Tree, gpus: bool) -> Finding {
    let version = tree.text("/proc/driver/nvidia/version").unwrap_or_default();
    let version = version.lines().next().and_then(|line| {
        line.split_whitespace().find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
    });
    match (version, library(tree)) {
        (Some(version), Some(path)) => Finding::ok("CUDA driver", format!("{version}, {path}")),
        (Some(version), None) => Finding::lack(
            "CUDA driver",
            format!("kernel driver {version}, but no libcuda.so.1"),
            "install the driver's user-space library, or start the container with --gpus all",
        ),
        (None, Some(path)) => Finding::lack(
            "CUDA driver",
            format!("{path}, but the kernel driver is not loaded"),
            "load it with `modprobe nvidia`, or run where the GPU is",
        ),
        (None, None) if gpus => Finding::lack("CUDA driver", "none", "install the NVIDIA driver"),
        (None, None) => Finding::lack("CUDA driver", "none", "none is needed without a GPU"),
    }
}

fn library(tree: &Tree) -> Option<String> {
    let path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let directories = path.split(':').filter(|directory| !directory.is_empty()).chain(LIBRARY_DIRECTORIES);
    directories.map(|directory| format!("{directory}/libcuda.so.1")).find(|path| tree.exists(path))
}

/// A NIC reaches GPU memory through dma-buf or the peer-memory module.
fn peer_memory(tree: &Tree) -> Finding {
    if tree.exists("/sys/module/nvidia_peermem") {
        return Finding::ok("GPU and NIC", "nvidia_peermem is loaded");
    }
    Finding::note(
        "GPU and NIC",
        "nvidia_peermem is not loaded",
        "nothing to do where the driver offers dma-buf (open kernel modules); else `modprobe nvidia_peermem`",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_gpu_its_driver_and_its_library_are_found() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/driver/nvidia/gpus/0000:18:00.0/information", "Model: \t\t NVIDIA H100\nIRQ: 1\n");
        write("sys/bus/pci/devices/0000:18:00.0/numa_node", "1\n");
        write(
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n",
        );
        let tree = Tree::new(root.path());
        assert_eq!(gpus(&tree)[0].found, "NVIDIA H100 at 0000:18:00.0, NUMA node 1");
        let without = driver(&tree, true);
        assert_eq!(without.verdict, Verdict::Lack);
        assert!(without.found.contains("570.86.15"), "{}", without.found);
        write("usr/lib64/libcuda.so.1", "");
        assert_eq!(driver(&tree, true).found, "570.86.15, /usr/lib64/libcuda.so.1");
    }
}
