//! CPUs, NUMA nodes and the kernel.

use super::Finding;
use super::tree::Tree;
use std::num::NonZeroUsize;

pub(super) fn examine(tree: &Tree) -> Vec<Finding> {
    vec![kernel(), cpus(tree), vectors(tree), numa(tree)]
}

fn kernel() -> Finding {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy();
    let found = format!("{} {release} on {}", system.sysname().to_string_lossy(), system.machine().to_string_lossy());
    // 5.3 brought pidfd_open; memfd sealing and SCM_RIGHTS are older.
    match version(&release) {
        Some(version) if version < (5, 3) => {
            Finding::lack("kernel", found, "5.3 or newer is needed: peers are watched through pidfds")
        }
        _ => Finding::ok("kernel", found),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn cpus(tree: &Tree) -> Finding {
    let info = tree.text("/proc/cpuinfo").unwrap_or_default();
    let model = field(&info, "model name").unwrap_or("unknown model");
    let usable = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let found = format!("{usable} usable, {model}");
    if usable < 4 {
        let advice = "keep `spin_us = 0` (the default): a deployment has more processes than this machine has cores";
        return Finding::note("CPU", found, advice);
    }
    Finding::ok("CPU", found)
}

fn vectors(tree: &Tree) -> Finding {
    let info = tree.text("/proc/cpuinfo").unwrap_or_default();
    let flags = field(&info, "flags").or_else(|| field(&info, "Features")).unwrap_or_default();
    let known = ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve"];
    let present: Vec<_> = known.into_iter().filter(|name| flags.split(' ').any(|flag| flag == *name)).collect();
    if present.iter().any(|name| ["avx2", "asimd"].contains(name)) {
        return Finding::ok("vector units", present.join(" "));
    }
    let found = if present.is_empty() { "none that is known".to_owned() } else { present.join(" ") };
    Finding::note("vector units", found, "the CPU kernels run, slowly; AVX2 or NEON makes them several times faster")
}

fn numa(tree: &Tree) -> Finding {
    let base = "/sys/devices/system/node";
    let nodes: Vec<String> = tree
        .names(base)
        .into_iter()
        .filter(|name| name.strip_prefix("node").is_some_and(|rest| rest.parse::<u32>().is_ok()))
        .map(|name| {
            let cpus = tree.text(&format!("{base}/{name}/cpulist")).unwrap_or_default();
            format!("{name}: CPUs {}", if cpus.is_empty() { "none" } else { &cpus })
        })
        .collect();
    match nodes.len() {
        0 => Finding::note("NUMA", "the kernel shows no nodes", "treated as one node; nothing to do on one socket"),
        1 => Finding::ok("NUMA", format!("1 node ({})", nodes[0])),
        count => Finding::ok("NUMA", format!("{count} nodes ({})", nodes.join("; "))),
    }
}

/// The value of the first `name : value` line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().filter_map(|line| line.split_once(':')).find(|(key, _)| key.trim() == name).map(|(_, v)| v.trim())
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn nodes_and_vector_units_are_read_from_the_kernels_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/cpuinfo", "processor\t: 0\nmodel name\t: Test CPU\nflags\t\t: fpu avx2 fma avx512f\n");
        write("sys/devices/system/node/node0/cpulist", "0-3\n");
        write("sys/devices/system/node/node10/cpulist", "8-11\n");
        write("sys/devices/system/node/node2/cpulist", "4-7\n");
        let tree = Tree::new(root.path());
        assert!(cpus(&tree).found.ends_with("Test CPU"));
        assert_eq!(vectors(&tree).found, "avx2 fma avx512f");
        assert_eq!(vectors(&tree).verdict, Verdict::Ok);
        assert_eq!(numa(&tree).found, "3 nodes (node0: CPUs 0-3; node2: CPUs 4-7; node10: CPUs 8-11)");
    }

    #[test]
    fn kernel_versions_compare_by_number() {
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert!(version("5.10.2").unwrap() > (5, 3));
        assert_eq!(version("custom"), None);
    }
}
