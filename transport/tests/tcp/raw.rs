//! A peer made by hand: it speaks the wire's bytes over a plain socket, as well or as badly as a test wants.

use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;
use stepmesh_transport::testing::{B, World};
use stepmesh_transport::{LinkId, LinkSpec};

pub(super) const VERSION: u16 = 2;
pub(super) const HELLO: u8 = 1;
pub(super) const PROOF: u8 = 3;
pub(super) const REJECT: u8 = 5;
pub(super) const WRITE: u8 = 1;
pub(super) const WRITE_IMMEDIATE: u8 = 2;
pub(super) const READ_REQUEST: u8 = 3;
pub(super) const REFUSED: u8 = 6;

/// The address in a link's descriptor.
pub(super) fn address(descriptor: &[u8]) -> SocketAddr {
    let ip: [u8; 16] = descriptor[8..24].try_into().unwrap();
    (Ipv6Addr::from(ip).to_canonical(), u16::from_le_bytes([descriptor[6], descriptor[7]])).into()
}

/// The descriptor of a link's half at `address`.
pub(super) fn descriptor(incarnation: u32, address: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(address) = address else { panic!("{address}") };
    let mut bytes = vec![VERSION as u8, b'L'];
    bytes.extend(incarnation.to_le_bytes());
    bytes.extend(address.port().to_le_bytes());
    bytes.extend(address.ip().to_ipv6_mapped().octets());
    bytes
}

/// The key in a region's descriptor.
pub(super) fn key(descriptor: &[u8]) -> u64 {
    u64::from_le_bytes(descriptor[6..14].try_into().unwrap())
}

/// A message of the hello, for lane 0 of 1.
pub(super) fn message(kind: u8, version: u16, reason: u8, incarnation: u32, body: [u8; 32]) -> [u8; 56] {
    let mut bytes = [0; 56];
    bytes[..8].copy_from_slice(b"stepmesh");
    bytes[8..10].copy_from_slice(&version.to_le_bytes());
    bytes[10] = kind;
    bytes[12] = 1;
    bytes[13] = reason;
    bytes[16..20].copy_from_slice(&incarnation.to_le_bytes());
    bytes[24..].copy_from_slice(&body);
    bytes
}

/// A frame's header.
#[derive(Clone, Copy, Default)]
pub(super) struct Frame {
    pub(super) opcode: u8,
    pub(super) incarnation: u32,
    pub(super) key: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) sequence: u64,
}

impl Frame {
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0x53, 0x4d, self.opcode, 0];
        bytes.extend(self.incarnation.to_le_bytes());
        for word in [self.key, self.offset, self.len, 0, self.sequence, 0] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }
}

/// A dialler.
pub(super) struct Raw(pub(super) TcpStream);

impl Raw {
    pub(super) fn dial(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        Self(stream)
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// `count` bytes, while the world goes on; fewer at the end of the stream.
    pub(super) fn receive(&mut self, world: &mut World<'_>, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut chunk = [0; 4096];
        for _ in 0..20_000 {
            world.pump();
            let wanted = (count - bytes.len()).min(chunk.len());
            match self.0.read(&mut chunk[..wanted]) {
                Ok(0) => return bytes,
                Ok(got) => bytes.extend(&chunk[..got]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return bytes,
            }
            if bytes.len() == count {
                return bytes;
            }
        }
        panic!("{} of {count} bytes came", bytes.len());
    }

    /// Says hello as the dialler of a link, and the challenge's answer made with `secret`; returns the last reply.
    pub(super) fn greet(&mut self, world: &mut World<'_>, spec: LinkSpec, secret: &[u8; 16]) -> Vec<u8> {
        let nonce = [7; 32];
        self.send(&message(HELLO, VERSION, 0, spec.incarnation, nonce));
        let challenge = self.receive(world, 56);
        if challenge.get(10) == Some(&REJECT) {
            return challenge;
        }
        let mut mac = Hmac::<Sha256>::new_from_slice(secret).unwrap();
        mac.update(b"stepmesh-tcp dialler ");
        mac.update(&VERSION.to_le_bytes());
        mac.update(&spec.incarnation.to_le_bytes());
        mac.update(&[0, 1]);
        mac.update(&nonce);
        mac.update(&challenge[24..]);
        self.send(&message(PROOF, VERSION, 0, spec.incarnation, mac.finalize().into_bytes().into()));
        self.receive(world, 56)
    }

    /// A dialler that has connected to the passive end of a fresh link of the world's end B.
    pub(super) fn connected(world: &mut World<'_>, spec: LinkSpec) -> (Self, LinkId) {
        let (link, descriptor_b) = world.ends[B].endpoint.open(spec).unwrap();
        let mut raw = Self::dial(address(&descriptor_b));
        let own = descriptor(spec.incarnation, raw.0.local_addr().unwrap());
        world.ends[B].endpoint.connect(link, &own, Duration::from_secs(10)).unwrap();
        let welcome = raw.greet(world, spec, &spec.secret.0);
        assert_eq!(welcome[10], 4, "{welcome:?}");
        world.until("the raw peer is connected", |ends| ends[B].connected(link) == 1);
        (raw, link)
    }
}
