//! The active side of a hello: dial, prove, be welcomed.

use super::connection::Connection;
use super::doorbell::{Doorbell, OwnDoorbell};
use super::hello::Transcript;
use super::rings::{Farewell, Rings};
use super::socket::{Dialled, Received, Socket, random};
use super::wire::{LinkDescriptor, Packet};
use crate::{Disconnect, LinkSpec, Side, TransportError};
use std::os::fd::AsFd;
use std::time::Instant;

/// A link on its way.
pub(super) struct Dial {
    peer: LinkDescriptor,
    pub(super) deadline: Option<Instant>,
    nonce: [u8; 16],
    socket: Option<Socket>,
    /// Made when the peer has proven itself.
    rings: Option<Rings>,
}

/// How far a dial has come.
pub(super) enum Progress {
    /// The peer's turn.
    Waiting,
    Connected(Box<Connection>),
    Failed(Disconnect),
}

impl Dial {
    pub(super) fn new(peer: LinkDescriptor, deadline: Option<Instant>) -> Result<Self, TransportError> {
        let mut nonce = [0; 16];
        random(&mut nonce)?;
        Ok(Self { peer, deadline, nonce, socket: None, rings: None })
    }

    /// Connects the socket if the peer has room; whether there is a new socket to watch.
    pub(super) fn dial(&mut self, spec: &LinkSpec) -> Result<Option<&Socket>, Disconnect> {
        if self.socket.is_some() {
            return Ok(None);
        }
        let pid = self.peer.pid;
        let failed = |what: String| Disconnect::NotConnected(format!("process {pid}: {what}"));
        let Dialled::Connected(socket) = Socket::dial(&self.peer.socket).map_err(failed)? else {
            return Ok(None);
        };
        let LinkSpec { incarnation, lanes, .. } = *spec;
        let hello = Packet::Hello { token: self.peer.token, incarnation, lanes, nonce: self.nonce };
        socket.send(&hello.encode(), &[]).map_err(|errno| failed(errno.to_string()))?;
        Ok(Some(self.socket.insert(socket)))
    }

    /// Gives up: a peer that believes itself connected already is told.
    pub(super) fn leave(self) {
        if let Some(rings) = self.rings {
            rings.leave(Farewell::Closed);
        }
    }

    /// Answers what has come.
    pub(super) fn advance(&mut self, spec: &LinkSpec, bell: &OwnDoorbell) -> Progress {
        loop {
            let Some(socket) = &self.socket else { return Progress::Waiting };
            let gone = |what: String| Progress::Failed(Disconnect::NotConnected(what));
            let (packet, fds) = match socket.receive() {
                Ok(Received::Nothing) => return Progress::Waiting,
                Ok(Received::HungUp) => return gone("the peer hung up during the hello".into()),
                Err(what) => return gone(what),
                Ok(Received::Packet(bytes, fds)) => (Packet::decode(&bytes), fds),
            };
            let reject = |what: &str| Progress::Failed(Disconnect::Rejected(what.into()));
            match (packet, self.rings.take()) {
                (Ok(Packet::Reject(why)), _) => return reject(why.why()),
                (Ok(Packet::Challenge { nonce, proof }), None) => {
                    let transcript = Transcript {
                        token: self.peer.token,
                        incarnation: spec.incarnation,
                        lanes: spec.lanes,
                        active_nonce: self.nonce,
                        passive_nonce: nonce,
                    };
                    if !transcript.verify(&spec.secret, Side::Passive, &proof) {
                        return reject("the peer could not prove the link secret");
                    }
                    let (rings, fd) = match Rings::create(spec.lanes) {
                        Ok(made) => made,
                        Err(error) => return gone(error.to_string()),
                    };
                    let proof = Packet::Proof { proof: transcript.prove(&spec.secret, Side::Active) };
                    if let Err(errno) = socket.send(&proof.encode(), &[bell.fd(), fd.as_fd()]) {
                        return gone(errno.to_string());
                    }
                    self.rings = Some(rings);
                }
                (Ok(Packet::Welcome), Some(rings)) => {
                    let bell = match fds.as_slice() {
                        [fd] => Doorbell::adopt(fd),
                        _ => Err("a welcome without a doorbell".into()),
                    };
                    return match (bell, self.socket.take()) {
                        (Ok(bell), Some(socket)) => Progress::Connected(Connection::new(socket, rings, bell)),
                        (Err(what), _) => reject(&what),
                        (_, None) => Progress::Waiting,
                    };
                }
                (Ok(_), _) => return reject("the peer spoke out of turn in the hello"),
                (Err(what), _) => return reject(&what),
            }
        }
    }
}
