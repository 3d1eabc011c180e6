//! The internet address of a rail, which the connection manager knows ports by.

use super::channel::Channel;
use super::identifier::Identifier;
use super::library::unsupported;
use super::sys::{
    in_addr, in6_addr, in6_addr__bindgen_ty_1, rdma_addr__bindgen_ty_1 as RawAddress, sockaddr_in, sockaddr_in6,
};
use crate::TransportError;
use crate::verbs::context::Context;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ptr;

/// The address by which `context`'s port is reached: that of its GID if it has one, else one of the addresses of this
/// host that leads to it, an IPv4 one if possible.
pub(super) fn of_rail(channel: &Channel, context: &Context) -> Result<IpAddr, TransportError> {
    let gid = Ipv6Addr::from(context.port.gid);
    let gid = gid.to_ipv4_mapped().map_or(IpAddr::V6(gid), IpAddr::V4);
    let mut candidates = of_host()?;
    candidates.sort_by_key(|address| (*address != gid, address.is_ipv6()));
    for address in candidates {
        let identifier = Identifier::new(channel, 0)?;
        if identifier.bind(SocketAddr::new(address, 0)).is_ok() && identifier.is_on(context) {
            return Ok(address);
        }
    }
    let (name, port) = (&context.name, context.port.number);
    Err(unsupported(&format!("port {port} of {name} has no internet address; give its network interface one")))
}

/// The addresses of this host that others can use.
fn of_host() -> Result<Vec<IpAddr>, TransportError> {
    let mut first = ptr::null_mut();
    // SAFETY: `first` is a place for the list.
    if unsafe { libc::getifaddrs(&mut first) } != 0 {
        return Err(TransportError::system("listing this host's addresses", std::io::Error::last_os_error()));
    }
    let mut addresses = Vec::new();
    let mut next = first;
    // SAFETY: the list's entries, and the addresses that they point to, stay until the list is freed.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        // SAFETY: as above; an entry may have no address.
        addresses.extend(unsafe { entry.ifa_addr.as_ref() }.and_then(|address| {
            match i32::from(address.sa_family) {
                // SAFETY: an address of this family has this type.
                libc::AF_INET => Some(unsafe { *ptr::from_ref(address).cast::<libc::sockaddr_in>() })
                    .map(|address| IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)))),
                // SAFETY: as above.
                libc::AF_INET6 => Some(unsafe { *ptr::from_ref(address).cast::<libc::sockaddr_in6>() })
                    .map(|address| IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr))),
                _ => None,
            }
        }));
    }
    // SAFETY: the list came from the system and is freed once.
    unsafe { libc::freeifaddrs(first) };
    addresses.retain(|address| match address {
        IpAddr::V4(address) => !address.is_loopback(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    });
    Ok(addresses)
}

/// An address as the library takes it.
pub(super) fn raw(address: SocketAddr) -> RawAddress {
    match address {
        SocketAddr::V4(address) => RawAddress {
            src_sin: sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: address.port().to_be(),
                sin_addr: in_addr { s_addr: u32::from(*address.ip()).to_be() },
                ..Default::default()
            },
        },
        SocketAddr::V6(address) => RawAddress {
            src_sin6: sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: address.port().to_be(),
                sin6_addr: in6_addr { __in6_u: in6_addr__bindgen_ty_1 { __u6_addr8: address.ip().octets() } },
                ..Default::default()
            },
        },
    }
}
