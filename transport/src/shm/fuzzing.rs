//! What the fuzz targets of `shm` call: each is given what a peer could have sent or written, panics if a promise is
//! broken, and says whether it was taken. No part of the API.

use super::endpoint::ShmEndpoint;
use super::ring::{CAPACITY, Cells, Consumer, Producer};
use super::socket::{Dialled, Socket};
use super::wire::{GrantDescriptor, LinkDescriptor, Packet};
use crate::sync::{AtomicU64, Ordering};
use crate::{Completion, DeviceOptions, Endpoint, LinkSecret, LinkSpec, Side};
use std::sync::Arc;
use std::time::Duration;

/// Descriptors, and packets as they come over the socket.
pub fn packets(bytes: &[u8]) -> bool {
    let packet = Packet::decode(bytes).is_ok_and(|packet| {
        assert_eq!(packet.encode(), bytes);
        true
    });
    let link = LinkDescriptor::decode(bytes).is_ok_and(|link| {
        assert_eq!(link.encode(), bytes);
        true
    });
    let grant = GrantDescriptor::decode(bytes).is_ok_and(|grant| {
        assert_eq!(grant.encode(), bytes);
        true
    });
    assert!(!(packet && link) && (packet || !grant));
    packet || link
}

/// Packets of a stranger to an endpoint that awaits a peer: each has its length, a byte, before it. Nobody is let in
/// who does not have the secret. Taken if the endpoint answers.
pub fn hello(bytes: &[u8]) -> bool {
    let answered = converse(bytes);
    assert_ne!(answered, Some(Answer::LetIn), "let in without the secret");
    answered == Some(Answer::Spoke)
}

#[derive(PartialEq, Eq, Debug)]
enum Answer {
    Silent,
    Spoke,
    LetIn,
}

/// None if the system lacks something.
fn converse(mut bytes: &[u8]) -> Option<Answer> {
    let mut endpoint = ShmEndpoint::new(DeviceOptions::default()).ok()?;
    let secret = LinkSecret([3; 16]);
    let spec = LinkSpec { incarnation: 7, secret, lanes: 1, side: Side::Passive };
    let (link, descriptor) = endpoint.open(spec).ok()?;
    // A stranger does not know the token; here it is what the seeds name, or nothing would be looked at.
    endpoint.link(link)?.token = 9;
    let descriptor = LinkDescriptor::decode(&descriptor).ok()?;
    let peer = LinkDescriptor { side: Side::Active, ..descriptor };
    endpoint.connect(link, &peer.encode(), Duration::from_secs(10)).ok()?;
    let Ok(Dialled::Connected(socket)) = Socket::dial(&descriptor.socket) else { return None };
    let mut completions = Vec::new();
    let mut spoke = false;
    while let Some((&len, rest)) = bytes.split_first() {
        let (packet, rest) = rest.split_at(rest.len().min(usize::from(len)));
        bytes = rest;
        let _ = socket.send(packet, &[]);
        // It looks at its sockets at every eighth poll.
        for _ in 0..8 {
            endpoint.poll(&mut completions).ok()?;
        }
        spoke |= matches!(socket.receive(), Ok(super::socket::Received::Packet(..)));
    }
    let connected = |completion: &Completion| matches!(completion, Completion::Connected { .. });
    Some(if completions.iter().any(connected) {
        Answer::LetIn
    } else if spoke {
        Answer::Spoke
    } else {
        Answer::Silent
    })
}

/// A ring's words, as a peer sees them: it writes what it likes.
struct Scribbled {
    entries: Vec<AtomicU64>,
    consumed: AtomicU64,
}

impl Cells for Arc<Scribbled> {
    fn entry(&self, index: usize) -> &AtomicU64 {
        &self.entries[index]
    }

    fn consumed(&self) -> &AtomicU64 {
        &self.consumed
    }
}

/// Steps of nine bytes on a ring whose honest ends are this side's: a peer writes a word into an entry or into the
/// count of what it consumed; this side produces, consumes, or gives back. Taken if this side found no nonsense.
pub fn ring(bytes: &[u8]) -> bool {
    let entries = (0..CAPACITY).map(|_| AtomicU64::new(0)).collect();
    let cells = Arc::new(Scribbled { entries, consumed: AtomicU64::new(0) });
    let mut producer = Producer::new(cells.clone());
    let mut consumer = Consumer::new(cells.clone());
    let mut taken = 0;
    for step in bytes.as_chunks::<9>().0 {
        let [op, word @ ..] = *step;
        let word = u64::from_le_bytes(word);
        let sane = match op % 6 {
            0 => {
                cells.entries[(word as usize) % CAPACITY].store(word.rotate_right(16), Ordering::Relaxed);
                true
            }
            1 => {
                cells.consumed.store(word, Ordering::Relaxed);
                true
            }
            // As many as a chain has.
            2 => match producer.has_room(word as usize % (CAPACITY + 2)) {
                Ok(true) => {
                    (0..word as usize % (CAPACITY + 2)).for_each(|_| producer.push(op.into()));
                    true
                }
                Ok(false) => true,
                Err(_) => false,
            },
            3 => match consumer.next() {
                Ok(found) => {
                    taken += u64::from(found.is_some());
                    true
                }
                Err(_) => {
                    assert!(consumer.is_ready(), "nonsense that a poll would not find");
                    false
                }
            },
            4 => {
                consumer.release();
                assert_eq!(cells.consumed.load(Ordering::Relaxed), taken);
                true
            }
            _ => {
                let ready = consumer.is_ready();
                assert_eq!(ready, consumer.is_ready());
                true
            }
        };
        // The link ends here.
        if !sane {
            return false;
        }
    }
    taken > 0
}

#[cfg(test)]
mod tests {
    use super::super::wire::Reject;
    use super::*;
    use crate::Access;
    use crate::fuzz_inputs::check;

    #[test]
    fn packets_of_any_bytes() {
        let link = LinkDescriptor { side: Side::Passive, host: [1; 16], pid: 2, socket: [3; 16], token: 4 };
        let seeds = [
            link.encode(),
            Packet::Hello { token: 9, incarnation: 7, lanes: 1, nonce: [5; 16] }.encode(),
            Packet::Challenge { nonce: [5; 16], proof: [6; 32] }.encode(),
            Packet::Proof { proof: [6; 32] }.encode(),
            Packet::Welcome.encode(),
            Packet::Reject(Reject::Lanes).encode(),
            Packet::Grant(GrantDescriptor { key: 1, len: 4096, access: Access::PeerWrite }).encode(),
        ];
        check("shm_packets", &seeds, packets);
    }

    #[test]
    fn hellos_of_any_packets() {
        let framed = |packet: Packet| {
            let bytes = packet.encode();
            [&[bytes.len() as u8][..], &bytes].concat()
        };
        let hello_of = |token| framed(Packet::Hello { token, incarnation: 7, lanes: 1, nonce: [5; 16] });
        let proof = framed(Packet::Proof { proof: [6; 32] });
        check("shm_hello", &[[hello_of(9), proof].concat(), hello_of(8)], hello);
    }

    #[test]
    fn rings_of_any_words() {
        let step = |op: u8, word: u64| [&[op][..], &word.to_le_bytes()].concat();
        // An entry of lap 1 and immediate 77 at index 0; the ring is its own peer elsewhere.
        let entry = (1_u64 << 32 | 77).rotate_left(16);
        let one = [step(0, entry), step(5, 0), step(3, 0), step(4, 0)].concat();
        let own = [step(2, 3), step(3, 0), step(3, 0), step(4, 0), step(2, CAPACITY as u64 - 1), step(3, 0)].concat();
        check("shm_ring", &[one, own], ring);
    }
}
