//! A lane that was closed here: what it still has to say leaves in the background, what it still receives is discarded.
//!
//! Closing a socket with unread bytes resets it, and the peer would lose what it has not read yet; so the socket is
//! read, into nothing, until the peer hangs up.

use super::outbox::{Flow, Rest};
use super::socket;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// How long a closed lane may take to say what it has to say.
pub(super) const LINGER: Duration = Duration::from_secs(1);
const READS_PER_TURN: usize = 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Linger {
    pub(super) socket: TcpStream,
    pub(super) deadline: Instant,
    rest: Rest,
    shut: bool,
}

impl Linger {
    /// Begins; the first turn is given by [`Linger::advance`].
    pub(super) fn new(socket: TcpStream, rest: Rest) -> Self {
        Self { socket, deadline: Instant::now() + LINGER, rest, shut: false }
    }

    /// Gives it a turn; `Idle` when nothing is left to do and the socket may go.
    pub(super) fn advance(&mut self) -> Flow {
        let sending = if self.shut { Ok(Flow::Blocked) } else { self.speak() };
        let Ok(sending) = sending else { return Flow::Idle };
        let mut nowhere = [0; 16 << 10];
        for _ in 0..READS_PER_TURN {
            match socket::receive(&self.socket, None, &mut nowhere) {
                Ok(0) => return Flow::Idle,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return sending,
                Err(_) => return Flow::Idle,
            }
        }
        Flow::More
    }

    fn speak(&mut self) -> io::Result<Flow> {
        let flow = self.rest.flush(&self.socket)?;
        if flow == Flow::Idle {
            self.socket.shutdown(Shutdown::Write)?;
            self.shut = true;
            return Ok(Flow::Blocked);
        }
        Ok(flow)
    }
}
