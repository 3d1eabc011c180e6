//! The descriptors that the control plane carries: of a link's half, with the proof that its maker knows the link
//! secret, and of a granted region.

use super::MAX_LANES;
use super::queue_pair::{Half, PeerPort};
use crate::{Access, Descriptor, LinkSecret, LinkSpec, Provider, Side, TransportError};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

pub(super) const VERSION: u8 = 1;
pub(super) const NONCE_BYTES: usize = 16;
pub(super) const PROOF_BYTES: usize = 32;
const LINK_BYTES: usize = 8;
const PORT_BYTES: usize = 20;
const HALF_BYTES: usize = 8;
const ADDRESS_BYTES: usize = 18;
const REGION_BYTES: usize = 16;
const KEY_BYTES: usize = 4;

/// A link's half, and how it is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LinkHalf {
    pub(super) incarnation: u32,
    pub(super) lanes: u8,
    pub(super) contact: Contact,
}

/// How a half is connected to: by rail, of which there are 1 to as many as lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Contact {
    /// The ports, and the queue pairs.
    QueuePairs { ports: Vec<PeerPort>, control: Half, lanes: Vec<Half> },
    /// Where it listens for the connection manager (the active end does not: its port is 0), and its part of the proofs.
    Listeners { nonce: [u8; NONCE_BYTES], addresses: Vec<SocketAddr> },
}

impl Contact {
    /// How many rails it has.
    pub(super) fn rails(&self) -> usize {
        match self {
            Self::QueuePairs { ports, .. } => ports.len(),
            Self::Listeners { addresses, .. } => addresses.len(),
        }
    }
}

/// What was granted under which keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Granted {
    pub(super) incarnation: u32,
    /// One for each rail of the granter's half.
    pub(super) keys: Vec<u32>,
    pub(super) len: u64,
    pub(super) access: Access,
}

fn refuse(what: impl Into<String>) -> TransportError {
    TransportError::Descriptor { provider: Provider::Verbs, what: what.into() }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn check_kind(bytes: &[u8], tag: u8, name: &str) -> Result<(), TransportError> {
    match bytes {
        [VERSION, kind, ..] if *kind == tag => Ok(()),
        [VERSION, ..] => Err(refuse(format!("not a {name}"))),
        [version, ..] => Err(refuse(format!("version {version} of the protocol meets version {VERSION}"))),
        [] => Err(refuse("it is empty")),
    }
}

/// A keyed hash of `parts`; `side` is who makes it.
pub(super) fn keyed_hash(secret: &LinkSecret, side: Side, parts: &[&[u8]]) -> Option<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(&secret.0).ok()?;
    mac.update(match side {
        Side::Active => b"stepmesh-verbs active ",
        Side::Passive => b"stepmesh-verbs passive",
    });
    parts.iter().for_each(|part| mac.update(part));
    Some(mac)
}

/// What this link's control messages carry besides their kind: 28 bits that a third party does not know.
pub(super) fn control_tag(spec: &LinkSpec) -> u32 {
    let mac = keyed_hash(&spec.secret, Side::Active, &[b"control", &spec.incarnation.to_le_bytes()]);
    mac.map_or(0, |mac| u32::from_le_bytes(field(&mac.finalize().into_bytes(), 0))) & 0x0FFF_FFFF
}

impl LinkHalf {
    /// Version, `L` or `M`, lanes, rails, incarnation; then of `L` path MTU, reads, LID and GID of each port, number and
    /// first packet of the control queue pair and of each lane; of `M` the nonce, address and port of each listener; the
    /// proof.
    pub(super) fn encode(&self, spec: &LinkSpec) -> Descriptor {
        let kind = match self.contact {
            Contact::QueuePairs { .. } => b'L',
            Contact::Listeners { .. } => b'M',
        };
        let mut bytes = vec![VERSION, kind, self.lanes, self.contact.rails() as u8];
        bytes.extend(self.incarnation.to_le_bytes());
        match &self.contact {
            Contact::QueuePairs { ports, control, lanes } => {
                for PeerPort { lid, gid, mtu, reads } in ports {
                    bytes.extend([*mtu, *reads]);
                    bytes.extend(lid.to_le_bytes());
                    bytes.extend(gid);
                }
                for half in [control].into_iter().chain(lanes) {
                    bytes.extend(half.number.to_le_bytes());
                    bytes.extend(half.first_packet.to_le_bytes());
                }
            }
            Contact::Listeners { nonce, addresses } => {
                bytes.extend(nonce);
                for address in addresses {
                    bytes.extend(match address.ip() {
                        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                        IpAddr::V6(ip) => ip.octets(),
                    });
                    bytes.extend(address.port().to_le_bytes());
                }
            }
        }
        // An HMAC takes keys of any length, so there always is one; were there none, the zeros would prove nothing.
        let mac = keyed_hash(&spec.secret, spec.side, &[&bytes]);
        bytes.extend(mac.map_or([0; PROOF_BYTES], |mac| mac.finalize().into_bytes().into()));
        bytes
    }

    /// The half that `bytes` describe, and whether the peer's side of `spec` made them.
    pub(super) fn decode(bytes: &[u8], spec: &LinkSpec) -> Result<(Self, bool), TransportError> {
        let by_manager = bytes.get(1) == Some(&b'M');
        check_kind(bytes, if by_manager { b'M' } else { b'L' }, "link")?;
        let [lanes, rails] = [2, 3].map(|at| usize::from(*bytes.get(at).unwrap_or(&0)));
        let contact_bytes = match by_manager {
            true => NONCE_BYTES + rails * ADDRESS_BYTES,
            false => rails * PORT_BYTES + (1 + lanes) * HALF_BYTES,
        };
        let len = LINK_BYTES + contact_bytes + PROOF_BYTES;
        let can_be = (1..=usize::from(MAX_LANES)).contains(&lanes) && (1..=lanes).contains(&rails);
        if !can_be || bytes.len() != len {
            let what = format!("a link of {lanes} lanes on {rails} rails has {len} bytes, this has {}", bytes.len());
            return Err(refuse(what));
        }
        let (body, proof) = bytes.split_at(len - PROOF_BYTES);
        let contact = &body[LINK_BYTES..];
        let contact = if by_manager { listeners(contact, spec.side)? } else { queue_pairs(contact, rails)? };
        let peer = match spec.side {
            Side::Active => Side::Passive,
            Side::Passive => Side::Active,
        };
        let proven = keyed_hash(&spec.secret, peer, &[body]).is_some_and(|mac| mac.verify_slice(proof).is_ok());
        let link = Self { incarnation: u32::from_le_bytes(field(body, 4)), lanes: lanes as u8, contact };
        Ok((link, proven))
    }
}

/// The contact of so many ports and the rest queue pairs.
fn queue_pairs(bytes: &[u8], rails: usize) -> Result<Contact, TransportError> {
    let (ports, halves) = bytes.split_at(rails * PORT_BYTES);
    let port = |port: &[u8]| {
        let lid = u16::from_le_bytes(field(port, 2));
        PeerPort { mtu: port[0], reads: port[1], lid, gid: field(port, 4) }
    };
    let ports: Vec<_> = ports.chunks_exact(PORT_BYTES).map(port).collect();
    if let Some(port) = ports.iter().find(|port| !(1..=5).contains(&port.mtu)) {
        return Err(refuse(format!("there is no path MTU {}", port.mtu)));
    }
    let half = |half: &[u8]| {
        let [number, first_packet] = [0, 4].map(|at| u32::from_le_bytes(field(half, at)));
        Half { number, first_packet }
    };
    let mut halves = halves.chunks_exact(HALF_BYTES).map(half);
    let control = halves.next().unwrap_or_default();
    Ok(Contact::QueuePairs { ports, control, lanes: halves.collect() })
}

/// The contact of the rest listeners, as the peer of `side` has them.
fn listeners(bytes: &[u8], side: Side) -> Result<Contact, TransportError> {
    let (nonce, addresses) = bytes.split_at(NONCE_BYTES);
    let address = |bytes: &[u8]| {
        let ip = Ipv6Addr::from(field::<16>(bytes, 0)).to_canonical();
        SocketAddr::new(ip, u16::from_le_bytes(field(bytes, 16)))
    };
    let addresses: Vec<_> = addresses.chunks_exact(ADDRESS_BYTES).map(address).collect();
    match addresses.iter().find(|address| side == Side::Active && address.port() == 0) {
        Some(address) => Err(refuse(format!("the peer does not listen at {}", address.ip()))),
        None => Ok(Contact::Listeners { nonce: field(nonce, 0), addresses }),
    }
}

impl Granted {
    /// Version, `R`, access, keys, incarnation, length; the key of each rail.
    pub(super) fn encode(&self) -> Descriptor {
        let access = if self.access == Access::PeerWrite { 2 } else { 1 };
        let mut bytes = vec![VERSION, b'R', access, self.keys.len() as u8];
        bytes.extend(self.incarnation.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.keys.iter().flat_map(|key| key.to_le_bytes()));
        bytes
    }

    /// The grant that `bytes` describe.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, TransportError> {
        check_kind(bytes, b'R', "region")?;
        let keys = usize::from(*bytes.get(3).unwrap_or(&0));
        let len = REGION_BYTES + keys * KEY_BYTES;
        if keys == 0 || bytes.len() != len {
            return Err(refuse(format!("a region of {keys} keys has {len} bytes, this has {}", bytes.len())));
        }
        let access = match bytes[2] {
            1 => Access::PeerRead,
            2 => Access::PeerWrite,
            other => return Err(refuse(format!("unknown access {other}"))),
        };
        Ok(Self {
            incarnation: u32::from_le_bytes(field(bytes, 4)),
            keys: (0..keys).map(|key| u32::from_le_bytes(field(bytes, REGION_BYTES + key * KEY_BYTES))).collect(),
            len: u64::from_le_bytes(field(bytes, 8)),
            access,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> (LinkHalf, LinkSpec) {
        let half = |number| Half { number, first_packet: number * 7 };
        let port = |lid| PeerPort { lid, gid: [lid as u8; 16], mtu: 5, reads: 16 };
        let (ports, lanes) = (vec![port(5), port(6)], vec![half(2), half(3)]);
        let contact = Contact::QueuePairs { ports, control: half(1), lanes };
        let link = LinkHalf { incarnation: 7, lanes: 2, contact };
        (link, LinkSpec { incarnation: 7, secret: LinkSecret([3; 16]), lanes: 2, side: Side::Passive })
    }

    fn listening(port: u16) -> LinkHalf {
        let addresses = vec![([10, 9, 0, 1], port).into(), ([0xfd00, 0, 0, 0, 0, 0, 0, 1], 7).into()];
        LinkHalf { contact: Contact::Listeners { nonce: [8; NONCE_BYTES], addresses }, ..example().0 }
    }

    #[test]
    fn descriptors_survive_the_control_plane() {
        let (link, spec) = example();
        let other = LinkSpec { side: Side::Active, ..spec };
        for half in [&link, &listening(9)] {
            assert_eq!(LinkHalf::decode(&half.encode(&spec), &other).unwrap(), (half.clone(), true));
        }
        let granted = Granted { incarnation: 7, keys: vec![1 << 30, 5], len: 12, access: Access::PeerWrite };
        assert_eq!(Granted::decode(&granted.encode()).unwrap(), granted);
        assert!(LinkHalf::decode(&granted.encode(), &other).is_err());
        assert!(Granted::decode(&link.encode(&spec)).is_err());
    }

    #[test]
    fn a_half_is_proven_by_the_other_side_with_the_secret_only() {
        let (link, spec) = example();
        let bytes = link.encode(&spec);
        let proven = |bytes: &[u8], spec: LinkSpec| LinkHalf::decode(bytes, &spec).unwrap().1;
        let reader = LinkSpec { side: Side::Active, ..spec };
        assert!(proven(&bytes, reader));
        assert!(!proven(&bytes, spec), "its own descriptor, reflected");
        assert!(!proven(&bytes, LinkSpec { secret: LinkSecret([4; 16]), ..reader }));
        let mut forged = bytes;
        forged[40] ^= 1;
        assert!(!proven(&forged, reader));
    }

    #[test]
    fn who_is_dialled_must_listen_and_who_dials_need_not() {
        let (_, spec) = example();
        let [passive, active] = [spec, LinkSpec { side: Side::Active, ..spec }];
        assert!(LinkHalf::decode(&listening(0).encode(&passive), &active).is_err());
        assert!(LinkHalf::decode(&listening(0).encode(&active), &passive).unwrap().1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..320), lanes in 0..10u8, rails in 0..10u8,
            kind in prop::sample::select(vec![b'L', b'M']),
        ) {
            let spec = example().1;
            let _ = (LinkHalf::decode(&bytes, &spec), Granted::decode(&bytes));
            let [of_lanes, of_rails] = [lanes, rails].map(usize::from);
            let contact_bytes = match kind {
                b'M' => NONCE_BYTES + of_rails * ADDRESS_BYTES,
                _ => of_rails * PORT_BYTES + (1 + of_lanes) * HALF_BYTES,
            };
            bytes.resize(LINK_BYTES + contact_bytes + PROOF_BYTES, 0);
            bytes[..4].copy_from_slice(&[VERSION, kind, lanes, rails]);
            if let Ok((_, proven)) = LinkHalf::decode(&bytes, &spec) {
                prop_assert!(!proven);
            }
        }
    }
}
