//! RDMA devices, their ports and GIDs.

use super::Finding;
use super::tree::Tree;

const BASE: &str = "/sys/class/infiniband";
/// GIDs of one port that are listed before the rest is only counted.
const GIDS_LISTED: usize = 4;

pub(super) fn examine(tree: &Tree) -> Vec<Finding> {
    let devices = tree.names(BASE);
    if devices.is_empty() {
        return vec![Finding::lack(
            "RDMA",
            "no RDMA device",
            "none is needed for shm and tcp; without a NIC, Soft-RoCE makes one: \
             `rdma link add rxe0 type rxe netdev eth0` (kernel module rdma_rxe)",
        )];
    }
    let mut findings: Vec<_> = devices.iter().flat_map(|device| ports(tree, device)).collect();
    if !tree.names("/dev/infiniband").iter().any(|name| name.starts_with("uverbs")) {
        findings.push(Finding::lack(
            "RDMA",
            "no /dev/infiniband/uverbs*",
            "load ib_uverbs, or pass the devices to the container: --device /dev/infiniband",
        ));
    }
    findings
}

fn ports(tree: &Tree, device: &str) -> Vec<Finding> {
    let base = format!("{BASE}/{device}/ports");
    tree.names(&base).into_iter().map(|port| examine_port(tree, device, &port, &format!("{base}/{port}"))).collect()
}

fn examine_port(tree: &Tree, device: &str, port: &str, base: &str) -> Finding {
    let read = |file: &str| tree.text(&format!("{base}/{file}")).unwrap_or_else(|| "unknown".into());
    let state = read("state");
    let state = state.split_once(':').map_or(state.as_str(), |(_, name)| name.trim());
    let link = read("link_layer");
    let gids = gids(tree, base);
    let listed = match gids.len() {
        0 => "no GID".to_owned(),
        count if count > GIDS_LISTED => {
            format!("GIDs {} and {} more", gids[..GIDS_LISTED].join(", "), count - GIDS_LISTED)
        }
        _ => format!("GIDs {}", gids.join(", ")),
    };
    let found = format!("{device} port {port}: {link}, {}, {state}; {listed}", read("rate"));
    if state != "ACTIVE" {
        return Finding::lack("RDMA", found, "bring the port up: check the cable, the switch, and the subnet manager");
    }
    if link == "Ethernet" && !gids.iter().any(|gid| gid.contains("RoCE v2")) {
        return Finding::lack("RDMA", found, "give the port's network interface an IP address: RoCE v2 needs its GID");
    }
    Finding::ok("RDMA", found)
}

/// "3 (RoCE v2, eth0) fe80::1" for each GID that is not zero.
fn gids(tree: &Tree, base: &str) -> Vec<String> {
    let attribute = |kind: &str, index: &str| tree.text(&format!("{base}/gid_attrs/{kind}/{index}"));
    tree.names(&format!("{base}/gids"))
        .into_iter()
        .filter_map(|index| {
            let gid = tree.text(&format!("{base}/gids/{index}"))?;
            let is_zero = gid.bytes().all(|byte| matches!(byte, b'0' | b':'));
            let about: Vec<_> =
                [attribute("types", &index), attribute("ndevs", &index)].into_iter().flatten().collect();
            (!is_zero).then(|| match about.is_empty() {
                true => format!("{index} {gid}"),
                false => format!("{index} ({}) {gid}", about.join(", ")),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn an_active_roce_port_shows_its_gids_and_an_inactive_one_its_remedy() {
        let root = tempfile::tempdir().unwrap();
        let port = "sys/class/infiniband/mlx5_0/ports/1";
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(&format!("{port}/state"), "4: ACTIVE\n");
        write(&format!("{port}/link_layer"), "Ethernet\n");
        write(&format!("{port}/rate"), "400 Gb/sec (4X NDR)\n");
        write(&format!("{port}/gids/0"), "fe80:0000:0000:0000:0000:0000:0000:0001\n");
        write(&format!("{port}/gids/1"), "0000:0000:0000:0000:0000:0000:0000:0000\n");
        write(&format!("{port}/gid_attrs/types/0"), "RoCE v2\n");
        write("dev/infiniband/uverbs0", "");
        let tree = Tree::new(root.path());
        let findings = examine(&tree);
        assert_eq!(findings.len(), 1);
        assert_eq!(
            findings[0].found,
            "mlx5_0 port 1: Ethernet, 400 Gb/sec (4X NDR), ACTIVE; \
             GIDs 0 (RoCE v2) fe80:0000:0000:0000:0000:0000:0000:0001"
        );
        write(&format!("{port}/state"), "1: DOWN\n");
        assert_eq!(examine(&tree)[0].verdict, Verdict::Lack);
    }
}
