//! Which of a port's addresses to use.

use super::sys::{IBV_GID_TYPE_ROCE_V2, ibv_gid_entry};
use std::net::Ipv6Addr;

/// The raw bytes of an entry's address.
pub(super) fn bytes(entry: &ibv_gid_entry) -> [u8; 16] {
    // SAFETY: every bit pattern of the union is valid as bytes.
    unsafe { entry.gid.raw }
}

/// The best entry: RoCE v2 before v1, a mapped IPv4 address before a routable one before a link-local one.
pub(super) fn choose(entries: &[ibv_gid_entry]) -> Option<&ibv_gid_entry> {
    let rank = |entry: &&ibv_gid_entry| {
        let address = Ipv6Addr::from(bytes(entry));
        let kind = match address {
            _ if address.to_ipv4_mapped().is_some() => 2,
            _ if address.is_unicast_link_local() => 0,
            _ => 1,
        };
        (entry.gid_type == IBV_GID_TYPE_ROCE_V2, kind, std::cmp::Reverse(entry.gid_index))
    };
    entries.iter().filter(|entry| bytes(entry) != [0; 16]).max_by_key(rank)
}

#[cfg(test)]
mod tests {
    use super::super::sys::{IBV_GID_TYPE_ROCE_V1, ibv_gid};
    use super::*;

    #[test]
    fn a_routable_v2_address_is_preferred() {
        let entry = |gid_index, gid_type, address: &str| {
            let raw = address.parse::<Ipv6Addr>().unwrap().octets();
            ibv_gid_entry { gid: ibv_gid { raw }, gid_index, port_num: 1, gid_type, ndev_ifindex: 0 }
        };
        let (v1, v2) = (IBV_GID_TYPE_ROCE_V1, IBV_GID_TYPE_ROCE_V2);
        let mut entries = vec![entry(0, v1, "::ffff:10.9.0.1"), entry(1, v2, "fe80::1"), entry(2, v1, "::")];
        assert_eq!(choose(&entries).unwrap().gid_index, 1);
        entries.push(entry(3, v2, "2001:db8::1"));
        assert_eq!(choose(&entries).unwrap().gid_index, 3);
        entries.extend([entry(4, v2, "::ffff:10.9.0.1"), entry(5, v2, "::ffff:10.9.0.2")]);
        assert_eq!(choose(&entries).unwrap().gid_index, 4);
        assert!(choose(&entries[2..3]).is_none());
    }
}
