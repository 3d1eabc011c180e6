//! What the fuzz target of `mem` calls. No part of the API.

use super::descriptor::{decode_half, decode_region, encode_half, encode_region};

/// A fabric's number.
const FABRIC: u64 = 5;

/// The descriptors of links and regions; says whether they were taken, and panics if a promise is broken.
pub fn descriptors(bytes: &[u8]) -> bool {
    let half = decode_half(FABRIC, bytes).is_ok_and(|half| {
        assert_eq!(encode_half(FABRIC, half), bytes);
        true
    });
    let region = decode_region(FABRIC, bytes).is_ok_and(|region| {
        assert_eq!(encode_region(FABRIC, region), bytes);
        true
    });
    assert!(!(half && region));
    half || region
}

#[cfg(test)]
mod tests {
    use super::super::descriptor::RegionDescriptor;
    use super::super::link::HalfId;
    use super::*;
    use crate::fuzz_inputs::check;
    use crate::{Access, LinkId};

    #[test]
    fn descriptors_of_any_bytes() {
        let half = HalfId { endpoint: 3, link: LinkId(4) };
        let region = RegionDescriptor { granter: half, key: 6, len: 4096, access: Access::PeerWrite };
        check("mem_descriptors", &[encode_half(FABRIC, half), encode_region(FABRIC, region)], descriptors);
    }
}
