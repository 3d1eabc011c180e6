//! The attention side: acquire → send_part → push_pull → wait → reply.

use crate::arguments;
use crate::event::Events;
use crate::members::with_attention;
use crate::status::{Failure, StepmeshStatus, guard};
use crate::tensor::{Parts, StepmeshPart, StepmeshTensor, address};
use std::ffi::c_void;
use std::time::Duration;
use stepmesh_mesh::{AttentionMesh, MeshError, Request, SendBuffer, Ticket};

/// What a request says besides its tensors.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepmeshRequest {
    /// Requests of equal microbatch and group may share a batch on the FFN side: the layer. Groups of a microbatch
    /// should grow from request to request within a step.
    pub group: u32,
    /// Not zero: the FFN side need not wait for this instance on this microbatch after this request.
    pub leave: u32,
    /// For the FFN side's program.
    pub app: [u8; 16],
    /// The parts in use, in the layout's order, at most 8.
    pub parts: *const StepmeshPart,
    /// How many.
    pub part_count: usize,
}

/// An attention instance and what its caller has in hand, by microbatch.
pub(crate) struct Attention {
    pub(crate) mesh: AttentionMesh,
    pub(crate) events: Events,
    microbatches: Vec<Microbatch>,
    last_number: u64,
}

#[derive(Default)]
struct Microbatch {
    buffer: Option<SendBuffer>,
    ticket: Option<(u64, Ticket)>,
    /// By FFN rank; holds until the next request on the microbatch.
    replies: Vec<Vec<StepmeshTensor>>,
    replied: bool,
}

/// A ticket's number: the microbatch in the low 16 bits, so that it is found at once.
const SLOT_BITS: u32 = 16;

impl Attention {
    pub(crate) fn new(mesh: AttentionMesh, microbatches: u16) -> Self {
        let microbatches = (0..microbatches).map(|_| Microbatch::default()).collect();
        Self { mesh, events: Events::default(), microbatches, last_number: 0 }
    }

    pub(crate) fn collect_events(&mut self) {
        while let Some(event) = self.mesh.next_event() {
            if let Some(answer) = self.events.keep(&event) {
                // A scheduler that is lost is an event of its own.
                let _ = self.mesh.send_control(answer);
            }
        }
    }

    fn microbatch(&mut self, index: u32) -> Result<&mut Microbatch, Failure> {
        let count = self.microbatches.len();
        let known = usize::try_from(index).ok().and_then(|index| self.microbatches.get_mut(index));
        known.ok_or_else(|| Failure::invalid(format!("microbatch {index} of {count}")))
    }

    /// The microbatch that a ticket is outstanding on, and the ticket.
    fn ticket(&mut self, number: u64) -> Result<(usize, Ticket), Failure> {
        let index = (number & ((1 << SLOT_BITS) - 1)) as usize;
        match self.microbatches.get(index).and_then(|microbatch| microbatch.ticket) {
            Some((known, ticket)) if known == number => Ok((index, ticket)),
            _ => Err(Failure::unknown(format!("ticket {number} is not outstanding"))),
        }
    }

    fn push_pull(&mut self, index: u32, request: Request<'_>) -> Result<u64, Failure> {
        let buffer = self.microbatch(index)?.buffer.take();
        let buffer = buffer.ok_or_else(|| Failure::unknown(format!("microbatch {index} is not acquired")))?;
        let ticket = self.mesh.push_pull(buffer, request)?;
        self.last_number += 1;
        let number = self.last_number << SLOT_BITS | u64::from(index);
        let microbatch = self.microbatch(index)?;
        microbatch.ticket = Some((number, ticket));
        microbatch.replied = false;
        Ok(number)
    }

    fn wait(&mut self, number: u64, timeout: Duration) -> Result<(), Failure> {
        let (index, ticket) = self.ticket(number)?;
        let microbatch = &mut self.microbatches[index];
        match self.mesh.wait(ticket, timeout) {
            Ok(reply) => {
                microbatch.replies.resize_with(reply.ranks(), Vec::new);
                for (rank, tensors) in microbatch.replies.iter_mut().enumerate() {
                    tensors.clear();
                    let parts = reply.parts(rank).iter().enumerate();
                    tensors.extend(parts.map(|(part, used)| StepmeshTensor::new(used, reply.part_place(rank, part))));
                }
                microbatch.replied = true;
                microbatch.ticket = None;
                Ok(())
            }
            Err(error) => {
                if matches!(error, MeshError::Ticket(_) | MeshError::UnknownTicket(_)) {
                    microbatch.ticket = None;
                }
                Err(error.into())
            }
        }
    }
}

/// Takes a microbatch's send slot, to be filled through stepmesh_send_part. WOULD_BLOCK while an earlier request on
/// it is under way or not waited for; NOT_LINKED while an FFN instance is missing. Makes no progress: poll between
/// attempts.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_acquire(handle: u64, microbatch: u32) -> StepmeshStatus {
    guard(|| {
        with_attention(handle, |attention| {
            attention.microbatch(microbatch)?;
            let buffer = attention.mesh.acquire(microbatch as u16)?;
            attention.microbatch(microbatch)?.buffer = Some(buffer);
            Ok(())
        })
    })
}

/// Where a part of an acquired send slot lies: *bytes bytes at *data, to be filled before stepmesh_push_pull. The
/// address of a part never changes while the handle lives, but may be written only between acquire and push_pull. It is the
/// GPU's where the slots are on one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_send_part(
    handle: u64,
    microbatch: u32,
    part: u32,
    data: *mut *mut c_void,
    bytes: *mut usize,
) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract, for both.
        let (data, bytes) = unsafe { (arguments::out(data, "data")?, arguments::out(bytes, "bytes")?) };
        with_attention(handle, |attention| {
            let buffer = attention.microbatch(microbatch)?.buffer.as_mut();
            let buffer = buffer.ok_or_else(|| Failure::unknown(format!("microbatch {microbatch} is not acquired")))?;
            let place = buffer.part_place(part as usize).filter(|(_, range)| !range.is_empty());
            let place = place.ok_or_else(|| Failure::unknown(format!("a request has no part {part}")))?;
            bytes.write(place.1.len());
            data.write(address(&place));
            Ok(())
        })
    })
}

/// Sends an acquired slot to every FFN instance. *ticket stands for all their replies. A request that is refused
/// gives the slot back: acquire it anew.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_push_pull(
    handle: u64,
    microbatch: u32,
    request: *const StepmeshRequest,
    ticket: *mut u64,
) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract, for both.
        let (request, ticket) = unsafe { (arguments::read(request, "request")?, arguments::out(ticket, "ticket")?) };
        // SAFETY: the crate's contract.
        let parts = unsafe { Parts::read(request.parts, request.part_count) }?;
        let request =
            Request { group: request.group, app: request.app, parts: parts.in_use(), leave: request.leave != 0 };
        ticket.write(with_attention(handle, |attention| attention.push_pull(microbatch, request))?);
        Ok(())
    })
}

/// Waits for all replies to a request, then consumes the ticket. TIMEOUT leaves it outstanding: wait again, or cancel.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_wait(handle: u64, ticket: u64, timeout_ms: u32) -> StepmeshStatus {
    guard(|| {
        let timeout = Duration::from_millis(timeout_ms.into());
        with_attention(handle, |attention| attention.wait(ticket, timeout))
    })
}

/// Gives a ticket up and consumes it. The FFN instances that have not replied are fenced off; the microbatch can be
/// acquired again when their links are back.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_cancel(handle: u64, ticket: u64) -> StepmeshStatus {
    guard(|| {
        with_attention(handle, |attention| {
            let (index, ticket) = attention.ticket(ticket)?;
            attention.microbatches[index].ticket = None;
            attention.mesh.cancel(ticket);
            let _ = attention.mesh.take(ticket);
            Ok(())
        })
    })
}

/// A part of one FFN instance's reply to a request that was waited for, in the slot where it landed. The bytes hold
/// until the next stepmesh_push_pull or stepmesh_leave on the microbatch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_reply(
    handle: u64,
    microbatch: u32,
    rank: u32,
    part: u32,
    tensor: *mut StepmeshTensor,
) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract.
        let out = unsafe { arguments::out(tensor, "tensor") }?;
        with_attention(handle, |attention| {
            let microbatch = attention.microbatch(microbatch)?;
            if !microbatch.replied {
                return Err(Failure::unknown("no reply: wait for the microbatch's ticket first"));
            }
            let found = microbatch.replies.get(rank as usize).and_then(|parts| parts.get(part as usize));
            out.write(*found.ok_or_else(|| Failure::unknown(format!("no part {part} of FFN rank {rank}'s reply")))?);
            Ok(())
        })
    })
}

/// Gives an acquired send slot back without sending it.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_release(handle: u64, microbatch: u32) -> StepmeshStatus {
    guard(|| {
        with_attention(handle, |attention| {
            let buffer = attention.microbatch(microbatch)?.buffer.take();
            buffer.map(drop).ok_or_else(|| Failure::unknown(format!("microbatch {microbatch} is not acquired")))
        })
    })
}

/// Tells the FFN instances not to wait for this instance on a microbatch until its next request. Takes the slot for
/// one round trip; WOULD_BLOCK while it is in use.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_leave(handle: u64, microbatch: u32) -> StepmeshStatus {
    guard(|| {
        with_attention(handle, |attention| {
            attention.microbatch(microbatch)?;
            attention.mesh.leave(microbatch as u16)?;
            attention.microbatch(microbatch)?.replied = false;
            Ok(())
        })
    })
}
