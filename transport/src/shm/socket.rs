//! Abstract Unix sockets that keep packets apart and pass file descriptors. Nothing here blocks.

use crate::TransportError;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// File descriptors in one packet.
const MAX_FDS: usize = 2;
/// Enough of a send buffer for every grant that a link may have outstanding; the system may give less.
const SEND_BUFFER: usize = 512 << 10;

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// Where peers connect.
pub(super) struct Listener {
    fd: OwnedFd,
    name: [u8; 16],
}

impl Listener {
    /// Listens under a random name.
    pub(super) fn bind() -> Result<Self, TransportError> {
        let failed = |errno: Errno| TransportError::system("listening for shm peers", errno);
        let mut name = [0; 16];
        random(&mut name)?;
        let fd = socket().map_err(failed)?;
        rustix::net::bind(&fd, &address(&name).map_err(failed)?).map_err(failed)?;
        rustix::net::listen(&fd, 4096).map_err(failed)?;
        Ok(Self { fd, name })
    }

    pub(super) fn name(&self) -> [u8; 16] {
        self.name
    }

    /// The next connection of this user, if there is one. Those of other users are dropped unheard.
    pub(super) fn accept(&self) -> Result<Option<Socket>, Errno> {
        loop {
            match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) if same_user(&fd) => return Ok(Some(Socket::new(fd))),
                Ok(_) | Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn address(name: &[u8; 16]) -> Result<SocketAddrUnix, Errno> {
    let mut full = *b"stepmesh-0123456789abcdef";
    full[9..].copy_from_slice(name);
    SocketAddrUnix::new_abstract_name(&full)
}

fn same_user(fd: &OwnedFd) -> bool {
    sockopt::socket_peercred(fd).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

/// Fills `bytes` from the system's randomness.
pub(super) fn random(bytes: &mut [u8]) -> Result<(), TransportError> {
    getrandom::fill(bytes).map_err(|error| {
        TransportError::system("asking the system for randomness", std::io::Error::other(error.to_string()))
    })
}

/// What a look at a socket found.
pub(super) enum Received {
    /// A packet.
    Packet(Vec<u8>, Vec<OwnedFd>),
    /// Nothing, for now.
    Nothing,
    /// The peer has hung up.
    HungUp,
}

/// How dialling went.
pub(super) enum Dialled {
    /// Connected.
    Connected(Socket),
    /// The listener's queue is full: try again.
    Busy,
}

/// A connection.
pub(super) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    fn new(fd: OwnedFd) -> Self {
        // Best effort: with a smaller buffer a peer that never looks at its socket takes fewer grants.
        let _ = sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER);
        Self { fd }
    }

    /// Connects to a listener.
    pub(super) fn dial(name: &[u8; 16]) -> Result<Dialled, String> {
        let fd = socket().map_err(|errno| format!("making a socket: {errno}"))?;
        let address = address(name).map_err(|errno| errno.to_string())?;
        match rustix::net::connect(&fd, &address) {
            Ok(()) if same_user(&fd) => Ok(Dialled::Connected(Self::new(fd))),
            Ok(()) => Err("the peer runs as another user".into()),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Dialled::Busy),
            Err(Errno::CONNREFUSED) => Err("nobody listens there: the peer's endpoint is gone".into()),
            Err(errno) => Err(errno.to_string()),
        }
    }

    /// Sends a packet, whole or not at all.
    pub(super) fn send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::INVAL);
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match rustix::net::sendmsg(&self.fd, &[IoSlice::new(packet)], &mut control, flags) {
                Err(Errno::INTR) => {}
                sent => return sent.map(|_| ()),
            }
        }
    }

    /// The next packet; one that is longer than any of ours, or has more descriptors, is an error.
    pub(super) fn receive(&self) -> Result<Received, String> {
        let mut bytes = [0; 128];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        loop {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let received = match rustix::net::recvmsg(&self.fd, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)
            {
                Ok(received) => received,
                // A reset is told once, ahead of the packets that came before it.
                Err(Errno::INTR | Errno::CONNRESET) => continue,
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(errno) => return Err(errno.to_string()),
            };
            let fds: Vec<OwnedFd> = control
                .drain()
                .flat_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                    _ => Vec::new(),
                })
                .collect();
            if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
                return Err("a packet that is too long, or with more descriptors than can be taken".into());
            }
            return Ok(match received.bytes {
                0 => Received::HungUp,
                len => Received::Packet(bytes[..len].to_vec(), fds),
            });
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
