//! Sockets: how they are made and tuned, and the two calls that move bytes between them and regions.

use crate::{Region, TransportError};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::time::Duration;

/// How long a peer's host may take none of this side's bytes, or answer no probe, before it counts as gone. A peer that
/// lives but is not polled for so long, while bytes wait for it, counts as gone too.
const SILENCE: Duration = Duration::from_secs(10);
const PROBE_AFTER: Duration = Duration::from_secs(2);
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// Places that one call sends from.
const PARTS: usize = 24;
/// Up to here it is quicker to bring several places together than to have the kernel look at each.
const TOGETHER: usize = 8 << 10;

/// A non-blocking listener; what it accepts inherits `busy_poll`.
pub(super) fn listen(address: SocketAddr, busy_poll: Duration) -> Result<TcpListener, TransportError> {
    if address.ip().is_unspecified() {
        return Err(TransportError::invalid(format!("{address}: name the address that peers shall dial")));
    }
    let fail = |error| TransportError::system(format!("listening on {address}"), error);
    let listener = TcpListener::bind(address).map_err(fail)?;
    listener.set_nonblocking(true).map_err(fail)?;
    set_busy_poll(&listener, busy_poll).map_err(|error| {
        let what = format!("busy polling for {busy_poll:?} (CAP_NET_ADMIN, or net.core.busy_read, allows it)");
        TransportError::system(what, error)
    })?;
    Ok(listener)
}

/// Starts to connect; the socket becomes writable when that is decided.
pub(super) fn dial(address: SocketAddr, busy_poll: Duration) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    tune(&socket, address.ip())?;
    set_busy_poll(&socket, busy_poll)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(errno) => Err(errno.into()),
    }
}

/// No delay, and silence noticed. Buffers are left to the kernel's own tuning, which grows them further than
/// an unprivileged process may.
pub(super) fn tune(socket: &impl std::os::fd::AsFd, peer: IpAddr) -> io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, PROBE_AFTER)?;
    sockopt::set_tcp_keepintvl(socket, PROBE_EVERY)?;
    sockopt::set_tcp_user_timeout(socket, SILENCE.as_millis() as u32)?;
    if peer.is_loopback() {
        // Nothing there can be congested, and what paces or measures only takes time. Without it all works, too.
        let _ = sockopt::set_tcp_congestion(socket, "reno");
    }
    Ok(())
}

/// Lets receives on an empty socket look at the card's queue for so long.
fn set_busy_poll(socket: &impl AsRawFd, time: Duration) -> io::Result<()> {
    if time.is_zero() {
        return Ok(());
    }
    let us = libc::c_int::try_from(time.as_micros()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the option's value is one `int`, which outlives the call.
    let result = unsafe {
        let size = size_of_val(&us) as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_BUSY_POLL, (&raw const us).cast(), size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes from several places that leave in one call.
pub(super) struct Gather<'a> {
    parts: [libc::iovec; PARTS],
    count: usize,
    bytes: usize,
    limit: usize,
    borrows: PhantomData<&'a [u8]>,
}

impl<'a> Gather<'a> {
    /// Nothing yet; takes up to `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        let none = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        Self { parts: [none; PARTS], count: 0, bytes: 0, limit, borrows: PhantomData }
    }

    /// Bytes gathered.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a header, its padding and its payload still fit.
    pub(super) fn has_room(&self) -> bool {
        self.count + 3 <= PARTS && self.bytes < self.limit
    }

    /// Adds plain bytes.
    pub(super) fn slice(&mut self, bytes: &'a [u8]) {
        self.push(bytes.as_ptr(), bytes.len());
    }

    /// Adds a range of a region, which was checked when it was posted.
    pub(super) fn region(&mut self, region: &'a Region, range: Range<usize>) {
        if let Ok(base) = region.at(range.clone()) {
            self.push(base.as_ptr(), range.len());
        }
    }

    fn push(&mut self, base: *const u8, len: usize) {
        let len = len.min(self.limit - self.bytes);
        if len > 0 && self.count < PARTS {
            self.parts[self.count] = libc::iovec { iov_base: base.cast_mut().cast(), iov_len: len };
            self.count += 1;
            self.bytes += len;
        }
    }

    /// Hands to the kernel what it takes; says how much that was. A single place is sent by the plainest call there is,
    /// which is quicker by a good part of a microsecond.
    pub(super) fn send(&mut self, socket: &TcpStream) -> io::Result<usize> {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        let parts = &self.parts[..self.count];
        let mut together = [MaybeUninit::<u8>::uninit(); TOGETHER];
        let single = match parts {
            [part] => Some((part.iov_base.cast_const(), part.iov_len)),
            _ if self.bytes <= TOGETHER => {
                let mut filled = 0;
                for part in parts {
                    // SAFETY: each part was filled by `push` from memory borrowed for 'a; together they have `self.bytes`.
                    unsafe {
                        let to = together.as_mut_ptr().add(filled);
                        ptr::copy_nonoverlapping(part.iov_base.cast_const().cast(), to, part.iov_len);
                    }
                    filled += part.iov_len;
                }
                Some((together.as_ptr().cast(), filled))
            }
            _ => None,
        };
        if let Some((base, len)) = single {
            // SAFETY: readable bytes, a part or those just brought together; the kernel writes nothing.
            return retry(|| unsafe {
                libc::syscall(libc::SYS_sendto, socket.as_raw_fd(), base, len, flags, NOBODY, 0)
            });
        }
        // SAFETY: `msghdr` is a plain C structure for which all zeros is the empty message.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.parts.as_mut_ptr();
        message.msg_iovlen = self.count as _;
        retry(|| {
            // SAFETY: the message points to the first `count` parts, each of which was filled by `push` from memory
            // borrowed for 'a, so all of it is readable during the call; the kernel writes nothing.
            unsafe { libc::syscall(libc::SYS_sendmsg, socket.as_raw_fd(), &raw const message, flags) }
        })
    }
}

/// Takes what has arrived: first into `body`, a range of a region, then into `stage`. Zero is the end of the stream.
pub(super) fn receive(
    socket: &TcpStream,
    body: Option<(&Region, Range<usize>)>,
    stage: &mut [u8],
) -> io::Result<usize> {
    let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; 2];
    let mut count = 0;
    if let Some((region, range)) = body {
        let base = region.at(range.clone()).map_err(io::Error::other)?;
        if !region.writable() {
            return Err(io::Error::other("the region is mapped read-only here"));
        }
        parts[0] = libc::iovec { iov_base: base.as_ptr().cast(), iov_len: range.len() };
        count = 1;
    }
    parts[count] = libc::iovec { iov_base: stage.as_mut_ptr().cast(), iov_len: stage.len() };
    if count == 0 || stage.is_empty() {
        let libc::iovec { iov_base, iov_len } = parts[0];
        // SAFETY: one place, and it is either of those below.
        return retry(|| unsafe {
            libc::syscall(libc::SYS_recvfrom, socket.as_raw_fd(), iov_base, iov_len, libc::MSG_DONTWAIT, NOBODY, NOBODY)
        });
    }
    retry(|| {
        // SAFETY: the first `count + 1` parts are a checked range of a region that the caller borrows, writable by
        // `Memory`'s contract, and an exclusively borrowed slice; the socket does not block.
        unsafe { libc::syscall(libc::SYS_readv, socket.as_raw_fd(), parts.as_ptr(), count as libc::c_long + 1) }
    })
}

/// No address is given, or asked for.
const NOBODY: *const u8 = ptr::null();

/// A system call's result, again if a signal interrupted it.
fn retry(mut call: impl FnMut() -> libc::c_long) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
