//! What the ends of a connection tell each other through the connection manager: the proof that each knows the link
//! secret. It covers the queue pair and the address that the connection is made with, and random numbers of both halves
//! of the link, so that nobody who overhears it can use it for a connection of his own.

use super::super::descriptor::{NONCE_BYTES, PROOF_BYTES, VERSION, keyed_hash};
use crate::{LinkSpec, Side};
use hmac::Mac;

const BODY_BYTES: usize = 8 + NONCE_BYTES;
pub(super) const REQUEST_BYTES: usize = BODY_BYTES + PROOF_BYTES;
pub(super) const ANSWER_BYTES: usize = 4 + PROOF_BYTES;

/// Which queue pair of which link a request is for, with the random number of the asking half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) incarnation: u32,
    /// 0 is the control queue pair, and from 1 the lanes.
    pub(super) number: u8,
    pub(super) nonce: [u8; NONCE_BYTES],
}

/// Where a connection begins at one end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub(super) gid: [u8; 16],
    pub(super) queue_pair: u32,
}

impl Request {
    fn body(&self) -> [u8; BODY_BYTES] {
        let mut body = [0; BODY_BYTES];
        body[..3].copy_from_slice(&[VERSION, b'Q', self.number]);
        body[4..8].copy_from_slice(&self.incarnation.to_le_bytes());
        body[8..].copy_from_slice(&self.nonce);
        body
    }

    /// What `side` proves, of its own or the other's `origin`; `asked` is the random number of the half that is asked.
    fn proof(
        &self,
        spec: &LinkSpec,
        side: Side,
        asked: &[u8; NONCE_BYTES],
        origin: Origin,
    ) -> Option<impl Mac + use<>> {
        let number = origin.queue_pair.to_le_bytes();
        keyed_hash(&spec.secret, side, &[&self.body(), asked, &origin.gid, &number])
    }

    /// Version, `Q`, number, zero, incarnation, nonce; the proof of the active end.
    pub(super) fn encode(
        &self,
        spec: &LinkSpec,
        asked: &[u8; NONCE_BYTES],
        origin: Origin,
    ) -> Option<[u8; REQUEST_BYTES]> {
        let proof = self.proof(spec, Side::Active, asked, origin)?.finalize().into_bytes();
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..BODY_BYTES].copy_from_slice(&self.body());
        bytes[BODY_BYTES..].copy_from_slice(&proof);
        Some(bytes)
    }

    /// The request that `bytes` carry, if they are one. Nothing is proven yet.
    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let [VERSION, b'Q', number, 0, a, b, c, d, ref rest @ ..] = *bytes else { return None };
        let nonce = rest.first_chunk().copied()?;
        Some(Self { incarnation: u32::from_le_bytes([a, b, c, d]), number, nonce })
    }

    /// Whether the active end of the link has made the `bytes` of this request, for a connection from `origin`.
    pub(super) fn is_proven(
        &self,
        bytes: &[u8; REQUEST_BYTES],
        spec: &LinkSpec,
        asked: &[u8; NONCE_BYTES],
        origin: Origin,
    ) -> bool {
        let proof = self.proof(spec, Side::Active, asked, origin);
        proof.is_some_and(|proof| proof.verify_slice(&bytes[BODY_BYTES..]).is_ok())
    }

    /// Version, `A`, two zeros; the proof of the passive end.
    pub(super) fn answer(
        &self,
        spec: &LinkSpec,
        asked: &[u8; NONCE_BYTES],
        origin: Origin,
    ) -> Option<[u8; ANSWER_BYTES]> {
        let proof = self.proof(spec, Side::Passive, asked, origin)?.finalize().into_bytes();
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..2].copy_from_slice(&[VERSION, b'A']);
        bytes[4..].copy_from_slice(&proof);
        Some(bytes)
    }

    /// Whether the passive end of the link has answered this request with `bytes`, for a connection to `origin`.
    pub(super) fn is_answered(
        &self,
        bytes: &[u8; REQUEST_BYTES],
        spec: &LinkSpec,
        asked: &[u8; NONCE_BYTES],
        origin: Origin,
    ) -> bool {
        let [VERSION, b'A', 0, 0, ref proof @ ..] = bytes[..ANSWER_BYTES] else { return false };
        let expected = self.proof(spec, Side::Passive, asked, origin);
        expected.is_some_and(|expected| expected.verify_slice(proof).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LinkSecret;
    use proptest::prelude::*;

    const ASKED: [u8; NONCE_BYTES] = [4; NONCE_BYTES];
    const ORIGIN: Origin = Origin { gid: [5; 16], queue_pair: 17 };

    fn spec(secret: u8) -> LinkSpec {
        LinkSpec { incarnation: 7, secret: LinkSecret([secret; 16]), lanes: 2, side: Side::Active }
    }

    fn request() -> Request {
        Request { incarnation: 7, number: 2, nonce: [9; NONCE_BYTES] }
    }

    fn padded(answer: [u8; ANSWER_BYTES]) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..ANSWER_BYTES].copy_from_slice(&answer);
        bytes
    }

    #[test]
    fn a_request_is_proven_for_its_link_and_its_origin_only() {
        let bytes = request().encode(&spec(3), &ASKED, ORIGIN).unwrap();
        let read = Request::decode(&bytes).unwrap();
        assert_eq!(read, request());
        assert!(read.is_proven(&bytes, &spec(3), &ASKED, ORIGIN));
        assert!(!read.is_proven(&bytes, &spec(4), &ASKED, ORIGIN), "another secret");
        assert!(!read.is_proven(&bytes, &spec(3), &[0; NONCE_BYTES], ORIGIN), "another half");
        let elsewhere = [Origin { queue_pair: 18, ..ORIGIN }, Origin { gid: [6; 16], ..ORIGIN }];
        assert!(elsewhere.iter().all(|&origin| !read.is_proven(&bytes, &spec(3), &ASKED, origin)));
        let other_lane = Request { number: 1, ..read };
        assert!(!other_lane.is_proven(&bytes, &spec(3), &ASKED, ORIGIN));
    }

    #[test]
    fn an_answer_is_proven_by_the_other_side_with_the_secret_only() {
        let answer = padded(request().answer(&spec(3), &ASKED, ORIGIN).unwrap());
        assert!(request().is_answered(&answer, &spec(3), &ASKED, ORIGIN));
        assert!(!request().is_answered(&answer, &spec(4), &ASKED, ORIGIN), "another secret");
        assert!(!request().is_answered(&answer, &spec(3), &ASKED, Origin { queue_pair: 18, ..ORIGIN }));
        let other = Request { nonce: [8; NONCE_BYTES], ..request() };
        assert!(!other.is_answered(&answer, &spec(3), &ASKED, ORIGIN), "the answer to another request");
        let mut reflected = padded([0; ANSWER_BYTES]);
        let proof = request().encode(&spec(3), &ASKED, ORIGIN).unwrap();
        reflected[..4].copy_from_slice(&[VERSION, b'A', 0, 0]);
        reflected[4..ANSWER_BYTES].copy_from_slice(&proof[BODY_BYTES..]);
        assert!(!request().is_answered(&reflected, &spec(3), &ASKED, ORIGIN), "its own proof, reflected");
    }

    proptest! {
        #[test]
        fn any_bytes_prove_nothing(bytes: [u8; 32], rest: [u8; 24], kind in prop::sample::select(vec![b'Q', b'A'])) {
            let mut message = [0; REQUEST_BYTES];
            message[..32].copy_from_slice(&bytes);
            message[32..].copy_from_slice(&rest);
            message[..2].copy_from_slice(&[VERSION, kind]);
            if let Some(request) = Request::decode(&message) {
                prop_assert!(!request.is_proven(&message, &spec(3), &ASKED, ORIGIN));
            }
            prop_assert!(!request().is_answered(&message, &spec(3), &ASKED, ORIGIN));
        }
    }
}
