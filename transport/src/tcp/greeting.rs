//! Connections that have not proven themselves yet, on either side: the hello as it proceeds over a socket.

use super::hello::{Kind, MESSAGE_BYTES, Message, Rejection, Transcript};
use super::socket::{self, Gather};
use crate::{Disconnect, LinkId, LinkSecret, Side};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Sends a message to a socket that has room for it, having been sent next to nothing yet.
pub(super) fn send(socket: &TcpStream, message: &Message) -> io::Result<()> {
    let bytes = message.encode();
    let mut gather = Gather::new(bytes.len());
    gather.slice(&bytes);
    if gather.send(socket)? == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// 32 random bytes.
fn nonce() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}

/// Why no message came.
enum Silence {
    Broken(io::Error),
    /// Bytes of another protocol.
    Foreign,
    Wrong(Rejection),
}

impl From<io::Error> for Silence {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// Collects one message at a time, and never a byte more.
#[derive(Debug)]
struct Mailbox {
    bytes: [u8; MESSAGE_BYTES],
    filled: usize,
}

impl Mailbox {
    fn new() -> Self {
        Self { bytes: [0; MESSAGE_BYTES], filled: 0 }
    }

    fn receive(&mut self, socket: &TcpStream) -> Result<Option<Message>, Silence> {
        while self.filled < MESSAGE_BYTES {
            match socket::receive(socket, None, &mut self.bytes[self.filled..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        self.filled = 0;
        Message::parse(&self.bytes).map(Some).map_err(|why| why.map_or(Silence::Foreign, Silence::Wrong))
    }
}

/// A connection that this side dials.
#[derive(Debug)]
pub(super) struct Dial {
    pub(super) socket: TcpStream,
    address: SocketAddr,
    mailbox: Mailbox,
    talk: Transcript,
    awaits: Awaits,
}

#[derive(Clone, Copy, Debug)]
enum Awaits {
    Connection,
    Challenge,
    Welcome,
}

impl Dial {
    /// Dials.
    pub(super) fn new(
        address: SocketAddr,
        incarnation: u32,
        lane: u8,
        lanes: u8,
        busy_poll: Duration,
    ) -> io::Result<Self> {
        let talk = Transcript { incarnation, lane, lanes, dialler_nonce: nonce()?, listener_nonce: [0; 32] };
        let socket = socket::dial(address, busy_poll)?;
        Ok(Self { socket, address, mailbox: Mailbox::new(), talk, awaits: Awaits::Connection })
    }

    /// A connection that is there and has said hello.
    #[cfg(any(test, fuzzing))]
    pub(super) fn answered(socket: TcpStream, incarnation: u32) -> Self {
        let talk = Transcript { incarnation, lanes: 1, ..Transcript::default() };
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        Self { socket, address, mailbox: Mailbox::new(), talk, awaits: Awaits::Challenge }
    }

    /// Goes on with the hello; true when the listener has welcomed this side and proven itself.
    pub(super) fn advance(&mut self, secret: &LinkSecret) -> Result<bool, Disconnect> {
        self.step(secret).map_err(|silence| match silence {
            Silence::Broken(error) => Disconnect::NotConnected(format!("{}: {error}", self.address)),
            Silence::Foreign => Disconnect::Rejected(format!("{} speaks another protocol", self.address)),
            Silence::Wrong(why) => Disconnect::Rejected(format!("{}: {why}", self.address)),
        })
    }

    fn step(&mut self, secret: &LinkSecret) -> Result<bool, Silence> {
        if let Awaits::Connection = self.awaits {
            if let Some(error) = self.socket.take_error()? {
                return Err(error.into());
            }
            if self.socket.peer_addr().is_err() {
                return Ok(false);
            }
            send(&self.socket, &Message::new(Kind::Hello, &self.talk, self.talk.dialler_nonce))?;
            self.awaits = Awaits::Challenge;
        }
        while let Some(message) = self.mailbox.receive(&self.socket)? {
            match (self.awaits, message.kind) {
                (_, Kind::Reject) => return Err(Silence::Wrong(message.rejection().unwrap_or(Rejection::Other))),
                (Awaits::Challenge, Kind::Challenge) => {
                    self.talk.listener_nonce = message.body;
                    let proof = self.talk.proof(secret, Side::Active);
                    send(&self.socket, &Message::new(Kind::Proof, &self.talk, proof))?;
                    self.awaits = Awaits::Welcome;
                }
                (Awaits::Welcome, Kind::Welcome) if self.talk.proves(secret, Side::Passive, &message.body) => {
                    return Ok(true);
                }
                (Awaits::Welcome, Kind::Welcome) => return Err(Silence::Wrong(Rejection::Secret)),
                _ => return Err(Silence::Wrong(Rejection::Other)),
            }
        }
        Ok(false)
    }
}

/// A connection that was accepted and has proven nothing yet.
#[derive(Debug)]
pub(super) struct Greeting {
    pub(super) socket: TcpStream,
    pub(super) deadline: Instant,
    mailbox: Mailbox,
    talk: Option<Transcript>,
}

/// How a greeting proceeds.
pub(super) enum Progress {
    Waiting,
    /// It proved the secret of this link's lane; the message welcomes it.
    Proven(LinkId, u8, Message),
    /// It is to be dropped; with the link that it claimed without proof.
    Dropped(Option<LinkId>),
}

impl Greeting {
    /// Awaits a hello until `deadline`.
    pub(super) fn new(socket: TcpStream, deadline: Instant) -> Self {
        Self { socket, deadline, mailbox: Mailbox::new(), talk: None }
    }

    /// Goes on with the hello; `find` names the link and its secret that a dialler may claim.
    pub(super) fn advance(
        &mut self,
        find: impl Fn(&Transcript) -> Result<(LinkId, LinkSecret), Rejection>,
    ) -> Progress {
        loop {
            let message = match self.mailbox.receive(&self.socket) {
                Ok(Some(message)) => message,
                Ok(None) => return Progress::Waiting,
                Err(Silence::Wrong(why)) => return self.reject(why, None),
                Err(Silence::Broken(_) | Silence::Foreign) => return Progress::Dropped(None),
            };
            match (message.kind, self.talk) {
                (Kind::Hello, None) => {
                    let Message { incarnation, lane, lanes, body: dialler_nonce, .. } = message;
                    let Ok(listener_nonce) = nonce() else { return Progress::Dropped(None) };
                    let talk = Transcript { incarnation, lane, lanes, dialler_nonce, listener_nonce };
                    if let Err(why) = find(&talk) {
                        return self.reject(why, None);
                    }
                    if send(&self.socket, &Message::new(Kind::Challenge, &talk, listener_nonce)).is_err() {
                        return Progress::Dropped(None);
                    }
                    self.talk = Some(talk);
                }
                (Kind::Proof, Some(talk)) => {
                    return match find(&talk) {
                        Err(why) => self.reject(why, None),
                        Ok((link, secret)) if talk.proves(&secret, Side::Active, &message.body) => {
                            let proof = talk.proof(&secret, Side::Passive);
                            Progress::Proven(link, talk.lane, Message::new(Kind::Welcome, &talk, proof))
                        }
                        Ok((link, _)) => self.reject(Rejection::Secret, Some(link)),
                    };
                }
                _ => return self.reject(Rejection::Other, None),
            }
        }
    }

    fn reject(&self, why: Rejection, claimed: Option<LinkId>) -> Progress {
        let _ = send(&self.socket, &Message::reject(why));
        Progress::Dropped(claimed)
    }
}
