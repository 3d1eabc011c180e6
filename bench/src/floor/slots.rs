//! Requests and replies through slots in shared memory, each copied once by who produces it and read by nobody.

use super::cache_line::{LAST, Line, await_turn};
use crate::timing::{Timing, measure};
use crate::{BenchError, Cpus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use stepmesh_transport::{Access, Device, Region};

/// A tensor and the slots that it is copied into, in turn.
struct Way {
    source: Region,
    slots: Region,
    bytes: usize,
    count: usize,
}

impl Way {
    fn allocate(device: &dyn Device, bytes: usize, count: usize) -> Result<Self, BenchError> {
        let source = device.allocate(bytes, Access::Local, None)?;
        Ok(Self { source, slots: device.allocate(bytes * count, Access::PeerWrite, None)?, bytes, count })
    }

    fn copy(&self, turn: u64) -> Result<(), BenchError> {
        let start = (turn % self.count as u64) as usize * self.bytes;
        let (source, target) = (self.source.at(0..self.bytes)?, self.slots.at(start..start + self.bytes)?);
        // SAFETY: both ranges lie in their regions, which are different memory and of this measurement only; the other
        // end touches this slot at other turns.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target.as_ptr(), self.bytes) };
        Ok(())
    }
}

/// Round trips of so many bytes there and back, one at a time, over `count` slots each way of the device's memory.
pub(crate) fn slot_echo(
    device: &dyn Device,
    cpus: Cpus,
    [there_bytes, back_bytes]: [usize; 2],
    count: usize,
    budget: Duration,
) -> Result<Timing, BenchError> {
    let (request, reply) = (Way::allocate(device, there_bytes, count)?, Way::allocate(device, back_bytes, count)?);
    let [there, back] = [Line(AtomicU64::new(0)), Line(AtomicU64::new(0))];
    let (timing, ()) = cpus.duel(
        |_| {
            let mut turn = 0;
            let timing = measure(budget, || {
                turn += 1;
                request.copy(turn)?;
                there.0.store(turn, Ordering::Release);
                await_turn(&back.0, turn);
                Ok(())
            });
            there.0.store(LAST, Ordering::Release);
            timing
        },
        |_| {
            let mut turn = 0;
            loop {
                turn = await_turn(&there.0, turn + 1);
                if turn == LAST {
                    return Ok(());
                }
                reply.copy(turn)?;
                back.0.store(turn, Ordering::Release);
            }
        },
    )?;
    Ok(timing)
}
