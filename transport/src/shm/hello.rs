//! The mutual proof of the link secret: each end signs both nonces, the link's numbers and its own side.

use crate::{LinkSecret, Side};
use hmac::{Hmac, Mac};
use sha2::Sha256;

/// What both ends have said before they prove it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transcript {
    pub(super) token: u64,
    pub(super) incarnation: u32,
    pub(super) lanes: u8,
    pub(super) active_nonce: [u8; 16],
    pub(super) passive_nonce: [u8; 16],
}

impl Transcript {
    /// The proof of `side`.
    pub(super) fn prove(&self, secret: &LinkSecret, side: Side) -> [u8; 32] {
        self.mac(secret, side).map_or([0; 32], |mac| mac.finalize().into_bytes().into())
    }

    /// Whether `proof` is the one of `side`, in constant time.
    pub(super) fn verify(&self, secret: &LinkSecret, side: Side, proof: &[u8; 32]) -> bool {
        self.mac(secret, side).is_some_and(|mac| mac.verify_slice(proof).is_ok())
    }

    /// Never nothing: HMAC takes keys of every length.
    fn mac(&self, secret: &LinkSecret, side: Side) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&secret.0).ok()?;
        mac.update(match side {
            Side::Active => b"stepmesh shm 1 active",
            Side::Passive => b"stepmesh shm 1 passiv",
        });
        mac.update(&self.token.to_le_bytes());
        mac.update(&self.incarnation.to_le_bytes());
        mac.update(&[self.lanes]);
        mac.update(&self.active_nonce);
        mac.update(&self.passive_nonce);
        Some(mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_side_secret_and_transcript_only() {
        let transcript =
            Transcript { token: 1, incarnation: 2, lanes: 3, active_nonce: [4; 16], passive_nonce: [5; 16] };
        let secret = LinkSecret([6; 16]);
        let proof = transcript.prove(&secret, Side::Active);
        assert!(transcript.verify(&secret, Side::Active, &proof));
        assert!(!transcript.verify(&secret, Side::Passive, &proof));
        assert!(!transcript.verify(&LinkSecret([7; 16]), Side::Active, &proof));
        let replayed = Transcript { passive_nonce: [8; 16], ..transcript };
        assert!(!replayed.verify(&secret, Side::Active, &proof));
    }
}
