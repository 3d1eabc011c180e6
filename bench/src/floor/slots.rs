//! Requests and replies through slots in shared memory, each copied once by who produces it and read by nobody; with a header
//! each, if asked for, which is checked by who gets it.

use super::cache_line::{LAST, Line, await_turn};
use crate::timing::{Timing, measure};
use crate::{BenchError, Cpus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use stepmesh_proto::{HEADER_MAX_BYTES, Header, Part};
use stepmesh_transport::{Access, Device, Region};

/// A tensor and the slots that it is copied into, in turn, and the slots of its headers.
struct Way {
    source: Region,
    slots: Region,
    headers: Region,
    bytes: usize,
    count: usize,
}

impl Way {
    fn allocate(device: &dyn Device, bytes: usize, count: usize) -> Result<Self, BenchError> {
        let source = device.allocate(bytes.max(1), Access::Local, None)?;
        let slots = device.allocate(bytes.max(1) * count, Access::PeerWrite, None)?;
        let headers = device.allocate(HEADER_MAX_BYTES * count, Access::PeerWrite, None)?;
        Ok(Self { source, slots, headers, bytes, count })
    }

    fn place(&self, turn: u64, bytes: usize) -> std::ops::Range<usize> {
        let start = (turn % self.count as u64) as usize * bytes;
        start..start + bytes
    }

    /// Copies the tensor and writes the header, if there is one.
    fn produce(&self, turn: u64, header: &mut Option<Header>) -> Result<(), BenchError> {
        let place = self.place(turn, self.bytes);
        let (source, target) = (self.source.at(0..self.bytes)?, self.slots.at(place)?);
        // SAFETY: both ranges lie in their regions, which are different memory and of this measurement only; the other
        // end touches this slot at other turns.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target.as_ptr(), self.bytes) };
        if let Some(header) = header {
            header.group = turn as u32;
            let mut encoded = [0; HEADER_MAX_BYTES];
            let bytes = header.encode(&mut encoded);
            let target = self.headers.at(self.place(turn, HEADER_MAX_BYTES))?;
            // SAFETY: as above; a header is no longer than its slot.
            unsafe { std::ptr::copy_nonoverlapping(encoded.as_ptr(), target.as_ptr(), bytes) };
        }
        Ok(())
    }

    /// Reads the header that has come, if one is to come, and checks it.
    fn check(&self, turn: u64, header: &mut Option<Header>) -> Result<(), BenchError> {
        let Some(header) = header else { return Ok(()) };
        // SAFETY: the other end writes this slot at other turns.
        let bytes = unsafe { self.headers.bytes(self.place(turn, HEADER_MAX_BYTES)) }?;
        let is_it = header.read(bytes).is_ok() && header.group == turn as u32;
        if is_it { Ok(()) } else { Err(BenchError::Sequence("the floor's header is another".into())) }
    }
}

/// Round trips of so many bytes there and back, one at a time, over `count` slots each way of the device's memory; with `parts`,
/// each behind a header of the wire's that names so many parts, written and checked, and nothing else of the mesh.
pub(crate) fn slot_echo(
    device: &dyn Device,
    cpus: Cpus,
    [there_bytes, back_bytes]: [usize; 2],
    parts: Option<[&[Part]; 2]>,
    count: usize,
    budget: Duration,
) -> Result<Timing, BenchError> {
    let (request, reply) = (Way::allocate(device, there_bytes, count)?, Way::allocate(device, back_bytes, count)?);
    let [there, back] = [Line(AtomicU64::new(0)), Line(AtomicU64::new(0))];
    let header = |parts: &[Part]| {
        let mut header = Header::default();
        header.set_parts(parts).map(|()| header).map_err(|error| BenchError::Sequence(error.to_string()))
    };
    let headers = parts.map(|[there, back]| Ok::<_, BenchError>([header(there)?, header(back)?])).transpose()?;
    let outgoing = |way: usize| headers.as_ref().map(|headers| headers[way]);
    let incoming = || headers.is_some().then(Header::default);
    let (timing, ()) = cpus.duel(
        |_| {
            let (mut turn, mut sent, mut landed) = (0, outgoing(0), incoming());
            let timing = measure(budget, || {
                turn += 1;
                request.produce(turn, &mut sent)?;
                there.0.store(turn, Ordering::Release);
                await_turn(&back.0, turn);
                reply.check(turn, &mut landed)
            });
            there.0.store(LAST, Ordering::Release);
            timing
        },
        |_| {
            let (mut turn, mut sent, mut landed) = (0, outgoing(1), incoming());
            loop {
                turn = await_turn(&there.0, turn + 1);
                if turn == LAST {
                    return Ok(());
                }
                // What it finds is told by whoever measures: this end must not leave the other waiting.
                let checked = request.check(turn, &mut landed);
                reply.produce(turn, &mut sent)?;
                back.0.store(turn, Ordering::Release);
                checked?;
            }
        },
    )?;
    Ok(timing)
}
