//! What the fuzz targets of `verbs` call: each is given what a peer could have sent, panics if a promise is broken, and
//! says whether it was taken. No part of the API.

use super::control::Message;
use super::descriptor::{Granted, LinkHalf};
use crate::{LinkSecret, LinkSpec, Side};

const SPEC: LinkSpec = LinkSpec { incarnation: 7, secret: LinkSecret([3; 16]), lanes: 2, side: Side::Passive };
const TAG: u32 = 0x0ABC_DEF1;

/// The descriptors of links and regions. Nobody proves a secret that it does not have.
pub fn descriptors(bytes: &[u8]) -> bool {
    let link =
        LinkHalf::decode(bytes, &LinkSpec { secret: LinkSecret([4; 16]), ..SPEC }).is_ok_and(|(half, proven)| {
            assert!(!proven && (1..=usize::from(half.lanes)).contains(&half.contact.rails()));
            let ours = LinkSpec { side: Side::Active, ..SPEC };
            assert!(LinkHalf::decode(&half.encode(&ours), &SPEC).is_ok_and(|again| again == (half, true)));
            true
        });
    let region = Granted::decode(bytes).is_ok_and(|granted| {
        assert_eq!(granted.encode(), bytes);
        true
    });
    assert!(!(link && region));
    link || region
}

/// Control messages, four bytes each: a kind, and the tag that only the two ends know.
pub fn control(bytes: &[u8]) -> bool {
    let understood = |bits: &[u8; 4]| {
        let bits = u32::from_le_bytes(*bits);
        Message::read(bits, TAG).is_some_and(|message| {
            assert_eq!(message.bits(TAG), bits);
            true
        })
    };
    bytes.as_chunks().0.iter().fold(false, |any, bits| understood(bits) | any)
}

#[cfg(test)]
mod tests {
    use super::super::descriptor::Contact;
    use super::super::queue_pair::{Half, PeerPort};
    use super::*;
    use crate::Access;
    use crate::fuzz_inputs::check;

    #[test]
    fn descriptors_of_any_bytes() {
        let half = |number| Half { number, first_packet: number * 7 };
        let port = PeerPort { lid: 5, gid: [9; 16], mtu: 5, reads: 16 };
        let contacts = [
            Contact::QueuePairs { ports: vec![port; 2], control: half(1), lanes: vec![half(2), half(3)] },
            Contact::Listeners { nonce: [8; 16], addresses: vec![([10, 9, 0, 1], 7).into(); 2] },
        ];
        let [pairs, listeners] = contacts.map(|contact| {
            LinkHalf { incarnation: 7, lanes: 2, contact }.encode(&LinkSpec { side: Side::Active, ..SPEC })
        });
        let granted = Granted { incarnation: 7, keys: vec![1 << 30, 5], len: 12, access: Access::PeerWrite };
        check("verbs_descriptors", &[pairs, listeners, granted.encode()], descriptors);
    }

    #[test]
    fn control_messages_of_any_bits() {
        let messages = [Message::Hello, Message::Bye, Message::Lost].map(|message| message.bits(TAG).to_le_bytes());
        check("verbs_control", &[messages.concat()], control);
    }
}
