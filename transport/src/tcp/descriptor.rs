//! The descriptors that the control plane carries: of a link's half, and of a granted region.

use super::frame::field;
use super::hello::VERSION;
use crate::{Access, Descriptor, Provider, TransportError};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

const LINK_BYTES: usize = 24;
const REGION_BYTES: usize = 23;

/// Where a link's half listens, and for which link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkHalf {
    pub(super) incarnation: u32,
    pub(super) address: SocketAddr,
}

/// What was granted under which key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Granted {
    pub(super) incarnation: u32,
    pub(super) key: u64,
    pub(super) len: u64,
    pub(super) access: Access,
}

fn refuse(what: impl Into<String>) -> TransportError {
    TransportError::Descriptor { provider: Provider::Tcp, what: what.into() }
}

/// Checks what both kinds begin with.
fn open<'a, const N: usize>(bytes: &'a [u8], tag: u8, name: &str) -> Result<&'a [u8; N], TransportError> {
    let Ok(bytes) = <&[u8; N]>::try_from(bytes) else {
        return Err(refuse(format!("a {name} has {N} bytes, this has {}", bytes.len())));
    };
    if u16::from(bytes[0]) != VERSION {
        return Err(refuse(format!("version {} of the protocol meets version {VERSION}", bytes[0])));
    }
    if bytes[1] != tag {
        return Err(refuse(format!("not a {name}")));
    }
    Ok(bytes)
}

impl LinkHalf {
    /// Version, `L`, incarnation, port, address as IPv6 (a mapped one for IPv4).
    pub(super) fn encode(&self) -> Descriptor {
        let mut bytes = vec![VERSION as u8, b'L'];
        bytes.extend(self.incarnation.to_le_bytes());
        bytes.extend(self.address.port().to_le_bytes());
        bytes.extend(match self.address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        });
        bytes
    }

    /// The half that `bytes` describe.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, TransportError> {
        let bytes = open::<LINK_BYTES>(bytes, b'L', "link")?;
        let ip = IpAddr::V6(Ipv6Addr::from(field::<16>(bytes, 8))).to_canonical();
        let port = u16::from_le_bytes(field(bytes, 6));
        if ip.is_unspecified() || port == 0 {
            return Err(refuse(format!("{ip}:{port} cannot be dialled")));
        }
        Ok(Self { incarnation: u32::from_le_bytes(field(bytes, 2)), address: SocketAddr::new(ip, port) })
    }
}

impl Granted {
    /// Version, `R`, incarnation, key, length, access.
    pub(super) fn encode(&self) -> Descriptor {
        let mut bytes = vec![VERSION as u8, b'R'];
        bytes.extend(self.incarnation.to_le_bytes());
        bytes.extend(self.key.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.push(if self.access == Access::PeerWrite { 2 } else { 1 });
        bytes
    }

    /// The grant that `bytes` describe.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, TransportError> {
        let bytes = open::<REGION_BYTES>(bytes, b'R', "region")?;
        let access = match bytes[22] {
            1 => Access::PeerRead,
            2 => Access::PeerWrite,
            other => return Err(refuse(format!("unknown access {other}"))),
        };
        Ok(Self {
            incarnation: u32::from_le_bytes(field(bytes, 2)),
            key: u64::from_le_bytes(field(bytes, 6)),
            len: u64::from_le_bytes(field(bytes, 14)),
            access,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn descriptors_survive_the_control_plane() {
        for address in ["127.0.0.1:80", "[::1]:9000"] {
            let half = LinkHalf { incarnation: 7, address: address.parse().unwrap() };
            assert_eq!(LinkHalf::decode(&half.encode()).unwrap(), half);
        }
        let granted = Granted { incarnation: 7, key: 1 << 60, len: 12, access: Access::PeerWrite };
        assert_eq!(Granted::decode(&granted.encode()).unwrap(), granted);
        assert!(LinkHalf::decode(&granted.encode()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..32)) {
            let _ = (LinkHalf::decode(&bytes), Granted::decode(&bytes));
        }
    }
}
