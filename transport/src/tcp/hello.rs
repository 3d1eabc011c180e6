//! The hello: the messages by which both ends of a connection prove the link secret before any frame is parsed.
//!
//! ```text
//!   dialler                        listener
//!   Hello     nonce        ──▶
//!                          ◀──     Challenge nonce
//!   Proof     HMAC(secret) ──▶
//!                          ◀──     Welcome   HMAC(secret)
//! ```
//! The listener may answer `Reject` with a reason instead. Each proof covers the prover's side, the incarnation, the
//! lane and both nonces, so none can be replayed, reflected or used on another lane; the secret never travels. A message
//! has 56 bytes: magic (8), version u16, kind u8, lane u8, lanes u8, reason u8, zero u16, incarnation u32, zero u32,
//! nonce or proof (32). Magic, version, kind and reason keep their places in every version, so that a version can be
//! named to a peer of another.

use super::frame::field;
use crate::{LinkSecret, Side};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::fmt;

/// Bytes of a message.
pub(super) const MESSAGE_BYTES: usize = 56;
/// The version of the hello and of the frames.
pub(super) const VERSION: u16 = 2;

const MAGIC: [u8; 8] = *b"stepmesh";

/// Which message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Hello = 1,
    Challenge = 2,
    Proof = 3,
    Welcome = 4,
    Reject = 5,
}

/// Why a connection was rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// The listener speaks this version only.
    Version(u16),
    /// No link of this incarnation is waiting for a connection.
    Incarnation,
    /// The link has other lanes, or this one is taken.
    Lane,
    /// The proof is wrong.
    Secret,
    /// A reason that this version does not know, or a message out of turn.
    Other,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(theirs) => write!(f, "version {theirs} of the protocol meets version {VERSION}"),
            Self::Incarnation => f.write_str("no link of this incarnation awaits a connection"),
            Self::Lane => f.write_str("the link has other lanes, or the lane is taken"),
            Self::Secret => f.write_str("the link secret was not proven"),
            Self::Other => f.write_str("the hello was not understood"),
        }
    }
}

/// One message of the hello.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) lane: u8,
    pub(super) lanes: u8,
    pub(super) incarnation: u32,
    /// The nonce or proof.
    pub(super) body: [u8; 32],
    reason: u8,
    version: u16,
}

impl Message {
    /// A message of this version.
    pub(super) fn new(kind: Kind, talk: &Transcript, body: [u8; 32]) -> Self {
        let Transcript { incarnation, lane, lanes, .. } = *talk;
        Self { kind, lane, lanes, incarnation, body, reason: 0, version: VERSION }
    }

    /// The listener's refusal.
    pub(super) fn reject(why: Rejection) -> Self {
        let reason = match why {
            Rejection::Other => 0,
            Rejection::Version(_) => 1,
            Rejection::Incarnation => 2,
            Rejection::Lane => 3,
            Rejection::Secret => 4,
        };
        Self { kind: Kind::Reject, lane: 0, lanes: 0, incarnation: 0, body: [0; 32], reason, version: VERSION }
    }

    /// Why the peer rejects, if this is its refusal.
    pub(super) fn rejection(&self) -> Option<Rejection> {
        (self.kind == Kind::Reject).then_some(match self.reason {
            1 => Rejection::Version(self.version),
            2 => Rejection::Incarnation,
            3 => Rejection::Lane,
            4 => Rejection::Secret,
            _ => Rejection::Other,
        })
    }

    /// As on the wire.
    pub(super) fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10] = self.kind as u8;
        bytes[11] = self.lane;
        bytes[12] = self.lanes;
        bytes[13] = self.reason;
        bytes[16..20].copy_from_slice(&self.incarnation.to_le_bytes());
        bytes[24..56].copy_from_slice(&self.body);
        bytes
    }

    /// A message, or why it is none; `None` for bytes of another protocol. A refusal is understood in any version.
    pub(super) fn parse(bytes: &[u8; MESSAGE_BYTES]) -> Result<Self, Option<Rejection>> {
        if bytes[0..8] != MAGIC {
            return Err(None);
        }
        let version = u16::from_le_bytes(field(bytes, 8));
        let kind = match bytes[10] {
            5 => Kind::Reject,
            _ if version != VERSION => return Err(Some(Rejection::Version(version))),
            1 => Kind::Hello,
            2 => Kind::Challenge,
            3 => Kind::Proof,
            4 => Kind::Welcome,
            _ => return Err(Some(Rejection::Other)),
        };
        Ok(Self {
            kind,
            lane: bytes[11],
            lanes: bytes[12],
            incarnation: u32::from_le_bytes(field(bytes, 16)),
            body: field(bytes, 24),
            reason: bytes[13],
            version,
        })
    }
}

/// What a proof covers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Transcript {
    pub(super) incarnation: u32,
    pub(super) lane: u8,
    pub(super) lanes: u8,
    pub(super) dialler_nonce: [u8; 32],
    pub(super) listener_nonce: [u8; 32],
}

impl Transcript {
    fn mac(&self, secret: &LinkSecret, prover: Side) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&secret.0).ok()?;
        mac.update(match prover {
            Side::Active => b"stepmesh-tcp dialler ",
            Side::Passive => b"stepmesh-tcp listener",
        });
        mac.update(&VERSION.to_le_bytes());
        mac.update(&self.incarnation.to_le_bytes());
        mac.update(&[self.lane, self.lanes]);
        mac.update(&self.dialler_nonce);
        mac.update(&self.listener_nonce);
        Some(mac)
    }

    /// What `prover` sends to show that it holds the secret.
    pub(super) fn proof(&self, secret: &LinkSecret, prover: Side) -> [u8; 32] {
        // An HMAC takes keys of any length, so there always is one; were there none, the zeros would prove nothing.
        self.mac(secret, prover).map_or([0; 32], |mac| mac.finalize().into_bytes().into())
    }

    /// Whether `proof` shows it, in constant time.
    pub(super) fn proves(&self, secret: &LinkSecret, prover: Side, proof: &[u8; 32]) -> bool {
        self.mac(secret, prover).is_some_and(|mac| mac.verify_slice(proof).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_proof_holds_for_its_own_talk_and_side_only() {
        let secret = LinkSecret([3; 16]);
        let talk = Transcript { incarnation: 9, lane: 1, lanes: 2, dialler_nonce: [4; 32], listener_nonce: [5; 32] };
        let proof = talk.proof(&secret, Side::Active);
        assert!(talk.proves(&secret, Side::Active, &proof));
        assert!(!talk.proves(&secret, Side::Passive, &proof));
        assert!(!talk.proves(&LinkSecret([4; 16]), Side::Active, &proof));
        assert!(!Transcript { lane: 0, ..talk }.proves(&secret, Side::Active, &proof));
        assert!(!Transcript { listener_nonce: [6; 32], ..talk }.proves(&secret, Side::Active, &proof));
    }

    #[test]
    fn another_version_is_named_and_its_refusal_understood() {
        let mut bytes = Message::new(Kind::Hello, &Transcript::default(), [0; 32]).encode();
        bytes[8] = 9;
        assert_eq!(Message::parse(&bytes).unwrap_err(), Some(Rejection::Version(9)));
        let mut bytes = Message::reject(Rejection::Version(1)).encode();
        bytes[8] = 9;
        assert_eq!(Message::parse(&bytes).unwrap().rejection(), Some(Rejection::Version(9)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(body: [u8; 32], start: [u8; 16], honest: bool) {
            let mut bytes = [0; MESSAGE_BYTES];
            bytes[24..].copy_from_slice(&body);
            bytes[8..24].copy_from_slice(&start);
            if honest {
                bytes[..8].copy_from_slice(&MAGIC);
            }
            let _ = Message::parse(&bytes);
        }
    }
}
