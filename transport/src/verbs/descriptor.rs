//! The descriptors that the control plane carries: of a link's half, with the proof that its maker knows the link
//! secret, and of a granted region.

use super::MAX_LANES;
use super::queue_pair::{Half, PeerPort};
use crate::{Access, Descriptor, LinkSecret, LinkSpec, Provider, Side, TransportError};
use hmac::{Hmac, Mac};
use sha2::Sha256;

const VERSION: u8 = 1;
const LINK_BYTES: usize = 16;
const PORT_BYTES: usize = 20;
const HALF_BYTES: usize = 8;
const PROOF_BYTES: usize = 32;
const REGION_BYTES: usize = 16;
const KEY_BYTES: usize = 4;

/// A link's half: where it is, and its queue pairs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LinkHalf {
    pub(super) incarnation: u32,
    /// Of its rails, 1 to as many as there are lanes.
    pub(super) ports: Vec<PeerPort>,
    pub(super) control: Half,
    pub(super) lanes: Vec<Half>,
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
fn keyed_hash(secret: &LinkSecret, side: Side, parts: &[&[u8]]) -> Option<Hmac<Sha256>> {
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
    /// The port of a lane.
    pub(super) fn port_of(&self, lane: usize) -> &PeerPort {
        &self.ports[lane % self.ports.len()]
    }

    /// Version, `L`, lanes, ports, incarnation; path MTU, reads, LID and GID of each port; number and first packet of
    /// the control queue pair and of each lane; the proof.
    pub(super) fn encode(&self, spec: &LinkSpec) -> Descriptor {
        let mut bytes = vec![VERSION, b'L', self.lanes.len() as u8, self.ports.len() as u8];
        bytes.extend(self.incarnation.to_le_bytes());
        for PeerPort { lid, gid, mtu, reads } in &self.ports {
            bytes.extend([*mtu, *reads]);
            bytes.extend(lid.to_le_bytes());
            bytes.extend(gid);
        }
        for half in [&self.control].into_iter().chain(&self.lanes) {
            bytes.extend(half.number.to_le_bytes());
            bytes.extend(half.first_packet.to_le_bytes());
        }
        // An HMAC takes keys of any length, so there always is one; were there none, the zeros would prove nothing.
        let mac = keyed_hash(&spec.secret, spec.side, &[&bytes]);
        bytes.extend(mac.map_or([0; PROOF_BYTES], |mac| mac.finalize().into_bytes().into()));
        bytes
    }

    /// The half that `bytes` describe, and whether the peer's side of `spec` made them.
    pub(super) fn decode(bytes: &[u8], spec: &LinkSpec) -> Result<(Self, bool), TransportError> {
        check_kind(bytes, b'L', "link")?;
        let [lanes, ports] = [2, 3].map(|at| usize::from(*bytes.get(at).unwrap_or(&0)));
        let len = LINK_BYTES + ports * PORT_BYTES + lanes * HALF_BYTES + PROOF_BYTES;
        let can_be = (1..=usize::from(MAX_LANES)).contains(&lanes) && (1..=lanes).contains(&ports);
        if !can_be || bytes.len() != len {
            let what = format!("a link of {lanes} lanes on {ports} ports has {len} bytes, this has {}", bytes.len());
            return Err(refuse(what));
        }
        let (body, proof) = bytes.split_at(len - PROOF_BYTES);
        let half = |at: usize| Half {
            number: u32::from_le_bytes(field(body, at)),
            first_packet: u32::from_le_bytes(field(body, at + 4)),
        };
        let port = |index: usize| {
            let at = LINK_BYTES - HALF_BYTES + index * PORT_BYTES;
            let lid = u16::from_le_bytes(field(body, at + 2));
            PeerPort { mtu: body[at], reads: body[at + 1], lid, gid: field(body, at + 4) }
        };
        let ports: Vec<_> = (0..ports).map(port).collect();
        if let Some(port) = ports.iter().find(|port| !(1..=5).contains(&port.mtu)) {
            return Err(refuse(format!("there is no path MTU {}", port.mtu)));
        }
        let peer = match spec.side {
            Side::Active => Side::Passive,
            Side::Passive => Side::Active,
        };
        let proven = keyed_hash(&spec.secret, peer, &[body]).is_some_and(|mac| mac.verify_slice(proof).is_ok());
        let link = Self {
            incarnation: u32::from_le_bytes(field(body, 4)),
            control: half(LINK_BYTES - HALF_BYTES + ports.len() * PORT_BYTES),
            lanes: (0..lanes).map(|lane| half(LINK_BYTES + ports.len() * PORT_BYTES + lane * HALF_BYTES)).collect(),
            ports,
        };
        Ok((link, proven))
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
        let ports = vec![port(5), port(6)];
        let link = LinkHalf { incarnation: 7, ports, control: half(1), lanes: vec![half(2), half(3)] };
        (link, LinkSpec { incarnation: 7, secret: LinkSecret([3; 16]), lanes: 2, side: Side::Passive })
    }

    #[test]
    fn descriptors_survive_the_control_plane() {
        let (link, spec) = example();
        let other = LinkSpec { side: Side::Active, ..spec };
        assert_eq!(LinkHalf::decode(&link.encode(&spec), &other).unwrap(), (link.clone(), true));
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

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..320), lanes in 0..10u8, ports in 0..10u8,
        ) {
            let spec = example().1;
            let _ = (LinkHalf::decode(&bytes, &spec), Granted::decode(&bytes));
            let len = LINK_BYTES + usize::from(ports) * PORT_BYTES + usize::from(lanes) * HALF_BYTES + PROOF_BYTES;
            bytes.resize(len, 0);
            bytes[..4].copy_from_slice(&[VERSION, b'L', lanes, ports]);
            if let Ok((_, proven)) = LinkHalf::decode(&bytes, &spec) {
                prop_assert!(!proven);
            }
        }
    }
}
