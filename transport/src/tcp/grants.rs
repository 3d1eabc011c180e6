//! The regions that the peer of one link may use, and the check of every frame against them.

use super::frame::{Header, Refusal};
use crate::{Access, Region};
use std::collections::BTreeMap;
use std::ops::Range;

/// What one link has granted.
#[derive(Debug)]
pub(super) struct Grants {
    incarnation: u32,
    regions: BTreeMap<u64, (Region, Access)>,
}

impl Grants {
    /// Nothing is granted yet.
    pub(super) fn new(incarnation: u32) -> Self {
        Self { incarnation, regions: BTreeMap::new() }
    }

    /// Grants `region` under `key`; says no if the key is in use.
    pub(super) fn insert(&mut self, key: u64, region: Region, access: Access) -> bool {
        if key == 0 || self.regions.contains_key(&key) {
            return false;
        }
        self.regions.insert(key, (region, access));
        true
    }

    /// Withdraws everything.
    pub(super) fn clear(&mut self) {
        self.regions.clear();
    }

    /// Whether the frame is of this link's incarnation.
    pub(super) fn incarnation(&self, header: &Header) -> Result<(), Refusal> {
        if header.incarnation == self.incarnation { Ok(()) } else { Err(Refusal::Incarnation) }
    }

    /// The bytes that the frame names, if the peer has the right `need` on all of them.
    pub(super) fn admit(&self, header: &Header, need: Access) -> Result<(&Region, Range<usize>), Refusal> {
        let (region, access) = self.regions.get(&header.key).ok_or(Refusal::Key)?;
        if *access < need {
            return Err(Refusal::Right);
        }
        let end = header.offset.checked_add(header.len).filter(|&end| end <= region.len() as u64);
        let end = end.ok_or(Refusal::Bounds)?;
        Ok((region, header.offset as usize..end as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::Opcode;
    use super::*;
    use crate::HostMemory;
    use std::sync::Arc;

    #[test]
    fn only_what_is_granted_is_admitted() {
        let region = Region::new(Arc::new(HostMemory::allocate(100, None).unwrap()));
        let mut grants = Grants::new(7);
        assert!(grants.insert(5, region.clone(), Access::PeerWrite));
        assert!(grants.insert(6, region.clone(), Access::PeerRead));
        assert!(!grants.insert(5, region, Access::PeerRead));
        let frame = |key, offset, len| Header { key, offset, len, ..Header::plain(Opcode::Write, 7) };
        let admit = |header: Header, need| grants.admit(&header, need).map(|(_, range)| range);
        assert_eq!(admit(frame(5, 40, 60), Access::PeerWrite), Ok(40..100));
        assert_eq!(admit(frame(6, 0, 100), Access::PeerRead), Ok(0..100));
        assert_eq!(admit(frame(6, 0, 1), Access::PeerWrite), Err(Refusal::Right));
        assert_eq!(admit(frame(9, 0, 1), Access::PeerRead), Err(Refusal::Key));
        assert_eq!(admit(frame(5, 41, 60), Access::PeerWrite), Err(Refusal::Bounds));
        assert_eq!(admit(frame(5, u64::MAX, 2), Access::PeerWrite), Err(Refusal::Bounds));
        assert_eq!(grants.incarnation(&Header::plain(Opcode::Bye, 8)), Err(Refusal::Incarnation));
    }
}
