//! Two connected TCP sockets over loopback that never block and are polled without pause.

use crate::BenchError;
use crate::cpus::Cpus;
use crate::timing::{Times, Timing, measure};
use crate::transport::window;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// The two.
struct Sockets([TcpStream; 2]);

impl Sockets {
    /// Connects them.
    fn connect() -> Result<Self, BenchError> {
        let pair = || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let sockets = [TcpStream::connect(listener.local_addr()?)?, listener.accept()?.0];
            for socket in &sockets {
                socket.set_nodelay(true)?;
                socket.set_nonblocking(true)?;
            }
            Ok::<_, std::io::Error>(Self(sockets))
        };
        pair().map_err(BenchError::system("connecting two sockets over loopback"))
    }
}

/// Round trips of so many bytes there and back, out of as many places in turn and into as many.
pub(crate) fn exchange(
    cpus: Cpus,
    [there, back]: [usize; 2],
    places: usize,
    budget: Duration,
) -> Result<Timing, BenchError> {
    let Sockets([mut a, mut b]) = Sockets::connect()?;
    let (timing, ()) = cpus.duel(
        |_| {
            let (sources, mut targets) = (vec![vec![1; there]; places], vec![vec![0; back]; places]);
            let mut turns = (0..places).cycle();
            let timing = measure(budget, || {
                let turn = turns.next().unwrap_or_default();
                send(&mut a, &sources[turn])?;
                receive(&mut a, &mut targets[turn]).map(drop)
            });
            a.shutdown(Shutdown::Write).map_err(BenchError::system("closing a socket"))?;
            timing
        },
        |_| {
            let (sources, mut targets) = (vec![vec![1; back]; places], vec![vec![0; there]; places]);
            let mut turns = (0..places).cycle();
            loop {
                let turn = turns.next().unwrap_or_default();
                if !receive(&mut b, &mut targets[turn])? {
                    return Ok(());
                }
                send(&mut b, &sources[turn])?;
            }
        },
    )?;
    Ok(timing)
}

/// Transfers of `bytes` one after the other, in one direction or in both; the times of one, of each direction.
pub(crate) fn pump(cpus: Cpus, bytes: usize, both: bool, budget: Duration) -> Result<Vec<Timing>, BenchError> {
    let Sockets([a, b]) = Sockets::connect()?;
    let (back, there) =
        cpus.duel(|_| Pump::new(a, bytes, true)?.run(Some((budget, both))), |_| Pump::new(b, bytes, both)?.run(None))?;
    Ok(if both { vec![there.timing(), back.timing()] } else { vec![there.timing()] })
}

/// One end of a stream.
struct Pump {
    socket: TcpStream,
    bytes: usize,
    source: Vec<u8>,
    target: Vec<u8>,
    sends: bool,
    sent: usize,
    transfers: usize,
    received: usize,
    half_since: Option<Instant>,
    times: Times,
}

impl Pump {
    fn new(socket: TcpStream, bytes: usize, sends: bool) -> Result<Self, BenchError> {
        let (source, target) = (vec![1; bytes], vec![0; bytes * window(bytes)]);
        let times = Times::new()?;
        Ok(Self { socket, bytes, source, target, sends, sent: 0, transfers: 0, received: 0, half_since: None, times })
    }

    /// Runs for the time that is given, and longer until there is something to take a median of, in both directions if
    /// the peer sends, too; or until the peer has had enough.
    fn run(mut self, limit: Option<(Duration, bool)>) -> Result<Times, BenchError> {
        let start = Instant::now();
        let few = 4 * window(self.bytes);
        let half = self.bytes * (window(self.bytes) / 2);
        let mut peer_sends = true;
        while self.sends || peer_sends {
            if self.sends {
                match some(self.socket.write(&self.source[self.sent..]))? {
                    Some(count) => {
                        self.sent += count;
                        self.transfers += self.sent / self.bytes;
                        self.sent %= self.bytes;
                    }
                    None => std::hint::spin_loop(),
                }
                let is_enough = |(budget, both): (Duration, bool)| {
                    self.transfers >= few && (self.received >= few * self.bytes || !both) && start.elapsed() > budget
                };
                if limit.map_or(!peer_sends, is_enough) {
                    self.sends = false;
                    self.socket.shutdown(Shutdown::Write).map_err(BenchError::system("closing a socket"))?;
                }
            }
            if peer_sends {
                // Up to the end of the transfer, as a receiver does that has a place for each.
                let at = self.received % self.target.len();
                let end = at - at % self.bytes + self.bytes;
                match some(self.socket.read(&mut self.target[at..end]))? {
                    Some(0) => {
                        peer_sends = false;
                        if limit.is_none() && !self.sends {
                            self.socket.shutdown(Shutdown::Write).map_err(BenchError::system("closing a socket"))?;
                        }
                    }
                    Some(count) => self.take(count, half),
                    None => std::hint::spin_loop(),
                }
            }
        }
        Ok(self.times)
    }

    fn take(&mut self, count: usize, half: usize) {
        let halves = self.received / half;
        self.received += count;
        if self.received / half > halves {
            let now = Instant::now();
            if let Some(since) = self.half_since.replace(now) {
                self.times.record(now - since, (half / self.bytes) as u32);
            }
        }
    }
}

/// What a call moved; nothing if it would have blocked.
fn some(result: std::io::Result<usize>) -> Result<Option<usize>, BenchError> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(BenchError::System { what: "a bare socket", source: error }),
    }
}

fn send(socket: &mut TcpStream, mut bytes: &[u8]) -> Result<(), BenchError> {
    while !bytes.is_empty() {
        match some(socket.write(bytes))? {
            Some(count) => bytes = &bytes[count..],
            None => std::hint::spin_loop(),
        }
    }
    Ok(())
}

/// Fills `bytes`; says no at the end of the stream.
fn receive(socket: &mut TcpStream, bytes: &mut [u8]) -> Result<bool, BenchError> {
    let mut filled = 0;
    while filled < bytes.len() {
        match some(socket.read(&mut bytes[filled..]))? {
            Some(0) => return Ok(false),
            Some(count) => filled += count,
            None => std::hint::spin_loop(),
        }
    }
    Ok(true)
}
