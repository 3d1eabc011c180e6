//! What the fuzz targets of `tcp` call: each is given what a peer could have sent, panics if a promise is broken, and
//! says whether it was taken. No part of the API.

use super::descriptor::{Granted, LinkHalf};
use super::frame::{Header, Opcode};
use super::grants::Grants;
use super::greeting::{Dial, Greeting, Progress};
use super::hello::{Kind, MESSAGE_BYTES, Message, Rejection};
use super::lane::{Fault, Lane};
use super::outbox::{Frame, Payload};
use crate::{Access, Disconnect, HostMemory, LinkId, LinkSecret, Region};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Instant;

const INCARNATION: u32 = 7;
/// What is granted for reading, and for writing, under these keys.
const READABLE: u64 = 1;
const WRITABLE: u64 = 2;
const LEN: usize = 4096;
/// More than a peer's frames need of turns.
const MANY: usize = 100_000;

/// Two ends of a stream, neither of which blocks; the first one receives `bytes`, and then the end.
fn stream(bytes: &[u8]) -> Option<(TcpStream, TcpStream)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (here, there) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
    let (here, mut there) = (TcpStream::from(here), TcpStream::from(there));
    there.write_all(&bytes[..bytes.len().min(32 << 10)]).ok()?;
    there.shutdown(Shutdown::Write).ok()?;
    Some((here, there))
}

fn filled(byte: u8) -> Option<Region> {
    let region = Region::new(Arc::new(HostMemory::allocate(LEN, None).ok()?));
    region.write(0, &[byte; LEN]).ok()?;
    Some(region)
}

/// The frames of a connected lane, whose end has granted two regions and asked for a write and a read. Taken if the
/// stream keeps to the protocol to its end.
pub fn frames(bytes: &[u8]) -> bool {
    let (Some((socket, _peer)), Some(readable), Some(writable), Some(own)) =
        (stream(bytes), filled(0x5A), filled(0), filled(0))
    else {
        return false;
    };
    let mut grants = Grants::new(INCARNATION);
    assert!(grants.insert(READABLE, readable.clone(), Access::PeerRead));
    assert!(grants.insert(WRITABLE, writable, Access::PeerWrite));
    let mut lane = Lane::new(socket, LinkId(0), 0, INCARNATION);
    let write = Header { key: 3, len: 100, signalled: true, ..Header::plain(Opcode::Write, INCARNATION) };
    lane.outbox.post(Frame::new(&write, Payload::Region(own.clone(), 0..100)), Some(1), None);
    let read = Header { key: 3, len: 50, sequence: 1, ..Header::plain(Opcode::ReadRequest, INCARNATION) };
    lane.outbox.post(Frame::new(&read, Payload::Nothing), Some(2), Some((own, 100..150)));
    let mut completions = Vec::new();
    let mut turns = 0..MANY;
    let taken = loop {
        assert!(turns.next().is_some(), "a peer's bytes do not end");
        match lane.serve(&grants, true, &mut completions, usize::MAX) {
            Ok(true) => {}
            Ok(false) => break lane.said_bye(),
            Err(Fault::Ended(Disconnect::PeerGone(why))) => break !why.contains("middle of a frame"),
            Err(_) => break false,
        }
    };
    let mut kept = [0; LEN];
    assert!(readable.read(0, &mut kept).is_ok() && kept == [0x5A; LEN], "written without the right");
    taken
}

/// A stream of the hello: to a listener, or to a dialler if the first byte is odd. Nobody proves a secret that it does
/// not have; taken if all messages are understood.
pub fn hello(bytes: &[u8]) -> bool {
    let Some((side, bytes)) = bytes.split_first() else { return false };
    let Some((socket, _peer)) = stream(bytes) else { return false };
    let secret = LinkSecret([3; 16]);
    if side & 1 == 1 {
        assert!(!matches!(Dial::answered(socket, INCARNATION).advance(&secret), Ok(true)), "proven without the secret");
    } else {
        let find = |talk: &super::hello::Transcript| {
            if talk.incarnation == INCARNATION { Ok((LinkId(0), secret)) } else { Err(Rejection::Incarnation) }
        };
        let progress = Greeting::new(socket, Instant::now()).advance(find);
        assert!(!matches!(progress, Progress::Proven(..)), "proven without the secret");
    }
    let messages = bytes.as_chunks::<MESSAGE_BYTES>().0;
    let understood = messages.iter().filter(|&bytes| match Message::parse(bytes) {
        Ok(message) => {
            let again = message.encode();
            assert!(Message::parse(&again).is_ok_and(|message| message.encode() == again));
            assert_eq!(message.rejection().is_some(), message.kind == Kind::Reject);
            true
        }
        Err(_) => false,
    });
    understood.count() == messages.len() && !messages.is_empty()
}

/// The descriptors of links and regions.
pub fn descriptors(bytes: &[u8]) -> bool {
    let link = LinkHalf::decode(bytes).is_ok_and(|half| {
        assert!(LinkHalf::decode(&half.encode()).is_ok_and(|again| again == half));
        true
    });
    let region = Granted::decode(bytes).is_ok_and(|granted| {
        assert_eq!(granted.encode(), bytes);
        true
    });
    assert!(!(link && region));
    link || region
}

#[cfg(test)]
mod tests {
    use super::super::hello::Transcript;
    use super::*;
    use crate::fuzz_inputs::check;

    fn frame(header: Header, payload: &[u8]) -> Vec<u8> {
        [&header.encode()[..], payload].concat()
    }

    #[test]
    fn frames_of_any_bytes() {
        let plain = |opcode| Header::plain(opcode, INCARNATION);
        let write = Header { key: WRITABLE, offset: 8, len: 64, signalled: true, ..plain(Opcode::Write) };
        let notify = Header { key: WRITABLE, len: 32, immediate: 9, sequence: 1, ..plain(Opcode::WriteImmediate) };
        let read = Header { key: READABLE, len: LEN as u64, sequence: 2, ..plain(Opcode::ReadRequest) };
        // The last byte of the peer's own read reaches this lane only after it has been asked for.
        let served = [frame(write, &[1; 64]), frame(notify, &[2; 32]), frame(read, &[])].concat();
        let bye = frame(Header { sequence: 3, ..plain(Opcode::Bye) }, &[]);
        let empty = frame(Header { immediate: 1, ..plain(Opcode::WriteImmediate) }, &[]);
        let seeds = [served.clone(), [served, bye.clone()].concat(), [empty, bye].concat()];
        check("tcp_frames", &seeds, frames);
    }

    #[test]
    fn hellos_of_any_bytes() {
        let talk = Transcript { incarnation: INCARNATION, lanes: 1, ..Transcript::default() };
        let message = |kind| Message::new(kind, &talk, [5; 32]).encode();
        let to_listener = [&[0][..], &message(Kind::Hello), &message(Kind::Proof)].concat();
        let to_dialler = [&[1][..], &message(Kind::Challenge), &message(Kind::Welcome)].concat();
        let rejected = [&[1][..], &Message::reject(Rejection::Version(1)).encode()].concat();
        check("tcp_hello", &[to_listener, to_dialler, rejected], hello);
    }

    #[test]
    fn descriptors_of_any_bytes() {
        let link = |address: &str| LinkHalf { incarnation: 7, address: address.parse().unwrap() }.encode();
        let granted = Granted { incarnation: 7, key: 9, len: 4096, access: Access::PeerWrite }.encode();
        check("tcp_descriptors", &[link("127.0.0.1:80"), link("[::1]:9000"), granted], descriptors);
    }
}
