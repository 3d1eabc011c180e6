//! The bytes that the two ends exchange: descriptors (through the control plane) and packets (over the socket).

use crate::{Access, Provider, Side, TransportError};

const MAGIC: [u8; 4] = *b"SMSH";
const VERSION: u8 = 2;

/// How a peer finds the other half of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkDescriptor {
    pub(super) side: Side,
    /// Which boot of which host.
    pub(super) host: [u8; 16],
    /// The process, for messages.
    pub(super) pid: u32,
    /// The passive side's socket; zeroes from the active side.
    pub(super) socket: [u8; 16],
    /// Which of the passive endpoint's links is meant.
    pub(super) token: u64,
}

/// A granted region, in the descriptor and over the socket alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GrantDescriptor {
    pub(super) key: u64,
    pub(super) len: u64,
    pub(super) access: Access,
}

/// A packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packet {
    /// Active: which link is wanted.
    Hello { token: u64, incarnation: u32, lanes: u8, nonce: [u8; 16] },
    /// Passive: its proof, and its own challenge.
    Challenge { nonce: [u8; 16], proof: [u8; 32] },
    /// Active: its proof, with its doorbell and the link's rings.
    Proof { proof: [u8; 32] },
    /// Passive: the link is up; with its doorbell.
    Welcome,
    /// Passive: no.
    Reject(Reject),
    /// Either: a region, with its memory.
    Grant(GrantDescriptor),
}

/// Why a hello was turned down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reject {
    NoSuchLink,
    Incarnation,
    Lanes,
    Proof,
    Memory,
}

impl Reject {
    pub(super) fn why(self) -> &'static str {
        match self {
            Self::NoSuchLink => "the peer expects no such link",
            Self::Incarnation => "the link is of another incarnation",
            Self::Lanes => "the two ends disagree on the number of lanes",
            Self::Proof => "the link secret was not proven",
            Self::Memory => "the memory that came with the hello is not as it should be",
        }
    }
}

/// Reads fixed-size fields off the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (field, rest) = self.0.split_first_chunk().ok_or("too short")?;
        self.0 = rest;
        Ok(*field)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take::<1>()?[0])
    }

    fn start(&mut self) -> Result<u8, String> {
        if self.take()? != MAGIC {
            return Err("other bytes than shm's".into());
        }
        match self.byte()? {
            VERSION => self.byte(),
            other => Err(format!("version {other} instead of {VERSION}")),
        }
    }

    fn end<T>(self, value: T) -> Result<T, String> {
        if self.0.is_empty() { Ok(value) } else { Err(format!("{} bytes too many", self.0.len())) }
    }
}

fn start(kind: u8) -> Vec<u8> {
    [&MAGIC[..], &[VERSION, kind]].concat()
}

fn damaged(what: String) -> TransportError {
    TransportError::Descriptor { provider: Provider::Shm, what }
}

impl LinkDescriptor {
    pub(super) fn encode(&self) -> Vec<u8> {
        let side = match self.side {
            Side::Active => 16,
            Side::Passive => 17,
        };
        [&start(side)[..], &self.host, &self.pid.to_le_bytes(), &self.socket, &self.token.to_le_bytes()].concat()
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, TransportError> {
        let parse = || {
            let mut fields = Fields(bytes);
            let side = match fields.start()? {
                16 => Side::Active,
                17 => Side::Passive,
                other => return Err(format!("no link descriptor: kind {other}")),
            };
            let descriptor = Self {
                side,
                host: fields.take()?,
                pid: u32::from_le_bytes(fields.take()?),
                socket: fields.take()?,
                token: u64::from_le_bytes(fields.take()?),
            };
            fields.end(descriptor)
        };
        parse().map_err(damaged)
    }
}

impl GrantDescriptor {
    pub(super) fn encode(&self) -> Vec<u8> {
        Packet::Grant(*self).encode()
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, TransportError> {
        match Packet::decode(bytes).map_err(damaged)? {
            Packet::Grant(grant) => Ok(grant),
            _ => Err(damaged("no region descriptor".into())),
        }
    }
}

impl Packet {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello { token, incarnation, lanes, nonce } => {
                [&start(1)[..], &token.to_le_bytes(), &incarnation.to_le_bytes(), &[*lanes], nonce].concat()
            }
            Self::Challenge { nonce, proof } => [&start(2)[..], nonce, proof].concat(),
            Self::Proof { proof } => [&start(3)[..], proof].concat(),
            Self::Welcome => start(4),
            Self::Reject(why) => [&start(5)[..], &[*why as u8]].concat(),
            Self::Grant(grant) => {
                let access = u8::from(grant.access == Access::PeerWrite);
                [&start(6)[..], &grant.key.to_le_bytes(), &grant.len.to_le_bytes(), &[access]].concat()
            }
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut fields = Fields(bytes);
        let packet = match fields.start()? {
            1 => Self::Hello {
                token: u64::from_le_bytes(fields.take()?),
                incarnation: u32::from_le_bytes(fields.take()?),
                lanes: fields.byte()?,
                nonce: fields.take()?,
            },
            2 => Self::Challenge { nonce: fields.take()?, proof: fields.take()? },
            3 => Self::Proof { proof: fields.take()? },
            4 => Self::Welcome,
            5 => Self::Reject(match fields.byte()? {
                0 => Reject::NoSuchLink,
                1 => Reject::Incarnation,
                2 => Reject::Lanes,
                3 => Reject::Proof,
                4 => Reject::Memory,
                other => return Err(format!("rejection {other}")),
            }),
            6 => Self::Grant(GrantDescriptor {
                key: u64::from_le_bytes(fields.take()?),
                len: u64::from_le_bytes(fields.take()?),
                access: match fields.byte()? {
                    0 => Access::PeerRead,
                    1 => Access::PeerWrite,
                    other => return Err(format!("access {other}")),
                },
            }),
            other => return Err(format!("packet kind {other}")),
        };
        fields.end(packet)
    }
}
