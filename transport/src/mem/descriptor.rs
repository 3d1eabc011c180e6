//! The descriptors of links and regions: fixed little-endian layouts that name their fabric.

use super::link::HalfId;
use crate::{Access, Descriptor, LinkId, Provider, TransportError};

const LINK: &[u8; 8] = b"SMmemL\x01\0";
const REGION: &[u8; 8] = b"SMmemR\x01\0";

/// What a granted region's descriptor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegionDescriptor {
    pub(super) granter: HalfId,
    pub(super) key: u64,
    pub(super) len: u64,
    pub(super) access: Access,
}

pub(super) fn encode_half(fabric: u64, half: HalfId) -> Descriptor {
    [&LINK[..], &fabric.to_le_bytes(), &half.endpoint.to_le_bytes(), &half.link.0.to_le_bytes()].concat()
}

pub(super) fn decode_half(fabric: u64, bytes: &[u8]) -> Result<HalfId, TransportError> {
    Fields::open(LINK, fabric, bytes, 24)?.half()
}

pub(super) fn encode_region(fabric: u64, region: RegionDescriptor) -> Descriptor {
    let RegionDescriptor { granter, key, len, access } = region;
    let mut bytes = [&REGION[..], &fabric.to_le_bytes()].concat();
    bytes.extend_from_slice(&granter.endpoint.to_le_bytes());
    bytes.extend_from_slice(&granter.link.0.to_le_bytes());
    bytes.extend_from_slice(&key.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.push(u8::from(access == Access::PeerWrite));
    bytes
}

pub(super) fn decode_region(fabric: u64, bytes: &[u8]) -> Result<RegionDescriptor, TransportError> {
    let mut fields = Fields::open(REGION, fabric, bytes, 41)?;
    let (granter, key, len) = (fields.half()?, fields.u64()?, fields.u64()?);
    let access = match fields.0 {
        [0] => Access::PeerRead,
        [1] => Access::PeerWrite,
        _ => return Err(refused("its access is neither reading nor writing")),
    };
    Ok(RegionDescriptor { granter, key, len, access })
}

/// A descriptor that is not taken.
pub(super) fn refused(what: impl Into<String>) -> TransportError {
    TransportError::Descriptor { provider: Provider::Mem, what: what.into() }
}

/// What is left to read.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn open(magic: &[u8; 8], fabric: u64, bytes: &'a [u8], len: usize) -> Result<Self, TransportError> {
        if bytes.len() != len || !bytes.starts_with(magic) {
            return Err(refused(format!("{} bytes that do not begin as one of {len} bytes does", bytes.len())));
        }
        let mut fields = Self(&bytes[magic.len()..]);
        if fields.u64()? != fabric {
            return Err(refused("it comes from another fabric"));
        }
        Ok(fields)
    }

    fn u64(&mut self) -> Result<u64, TransportError> {
        self.take().map(u64::from_le_bytes)
    }

    fn half(&mut self) -> Result<HalfId, TransportError> {
        let endpoint = u32::from_le_bytes(self.take()?);
        Ok(HalfId { endpoint, link: LinkId(u32::from_le_bytes(self.take()?)) })
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], TransportError> {
        let (head, rest) = self.0.split_first_chunk().ok_or_else(|| refused("it is cut short"))?;
        self.0 = rest;
        Ok(*head)
    }
}
