//! Someone else's engine exchanges tensors, without mesh or model: `cargo run --example pingpong -- shm` (tcp, verbs).
//! Two threads stand for two processes; the channels between them for whatever carries a few bytes at start-up.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use stepmesh_transport::*;

type Failure = Box<dyn std::error::Error + Send + Sync>;
const TENSOR_BYTES: usize = 64 << 10;
const ROUNDS: u32 = 100;

fn engine(provider: Provider, side: Side, to: Sender<Vec<u8>>, from: Receiver<Vec<u8>>) -> Result<Duration, Failure> {
    let device = open(provider, &DeviceOptions::default())?;
    let mut endpoint = device.endpoint()?;
    let spec = LinkSpec { incarnation: 1, secret: LinkSecret([7; 16]), lanes: 1, side };
    let (link, descriptor) = endpoint.open(spec)?;
    to.send(descriptor)?;
    endpoint.connect(link, &from.recv()?, Duration::from_secs(10))?;
    let mut seen = Vec::new();
    let mut next = |endpoint: &mut dyn Endpoint| -> Result<Completion, Failure> {
        while seen.is_empty() {
            endpoint.wait(Duration::from_secs(1))?;
            endpoint.poll(&mut seen)?;
        }
        Ok(seen.remove(0))
    };
    assert_eq!(next(&mut *endpoint)?, Completion::Connected { link });
    let inbox = device.allocate(TENSOR_BYTES, Access::PeerWrite, None)?;
    let outbox = device.allocate(TENSOR_BYTES, Access::Local, None)?;
    to.send(endpoint.grant(link, &inbox, Access::PeerWrite)?)?;
    let peer = endpoint.import(link, &from.recv()?, None)?;
    let (start, mut tensor) = (Instant::now(), vec![0; TENSOR_BYTES]);
    for round in 0..ROUNDS {
        if side == Side::Passive {
            assert_eq!(next(&mut *endpoint)?, Completion::Immediate { link, lane: 0, immediate: round });
            inbox.read(0, &mut tensor)?;
            tensor.iter().for_each(|byte| assert_eq!(*byte, round as u8));
        }
        outbox.write(0, &[round as u8; TENSOR_BYTES])?;
        let (source, remote) = (Source::region(&outbox, 0..TENSOR_BYTES), Some(Remote { region: &peer, offset: 0 }));
        let op = Op::WriteImmediate { source, remote, immediate: round };
        endpoint.post(link, 0, &[Work { op, signal: None }])?;
        if side == Side::Active {
            assert_eq!(next(&mut *endpoint)?, Completion::Immediate { link, lane: 0, immediate: round });
        }
    }
    to.send(Vec::new())?;
    from.recv()?; // Both have all they want: the link may go.
    Ok(start.elapsed() / ROUNDS)
}

fn main() -> Result<(), Failure> {
    let provider: Provider = std::env::args().nth(1).as_deref().unwrap_or("shm").parse()?;
    let ((to_b, from_a), (to_a, from_b)) = (channel(), channel());
    let passive = std::thread::spawn(move || engine(provider, Side::Passive, to_a, from_a));
    let round_trip = engine(provider, Side::Active, to_b, from_b)?;
    passive.join().map_err(|_| "the passive engine panicked")??;
    println!("{provider}: {TENSOR_BYTES} bytes there and back in {round_trip:?}");
    Ok(())
}
