//! The FFN side: next_batch → segment_part → segment_reply → set_reply → respond.

use crate::arguments;
use crate::event::Events;
use crate::members::with_ffn;
use crate::status::{Failure, StepmeshStatus, guard};
use crate::tensor::{Parts, StepmeshPart, StepmeshTensor, address};
use std::ffi::{c_char, c_void};
use std::time::Duration;
use stepmesh_mesh::{Batch, FfnMesh, Policy, Segment};

/// When a batch is released.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepmeshPolicy {
    /// With every attention instance that can still reach the group.
    All = 0,
    /// At once, with whoever is there.
    Any = 1,
    /// When `value` attention instances are there, or nobody else can still reach the group.
    AtLeast = 2,
    /// As ALL, but no later than `value` milliseconds after the group's first arrival.
    Deadline = 3,
}

/// The requests of one (microbatch, group), by ascending rank of the attention instances.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepmeshBatch {
    /// Stands for it until stepmesh_respond.
    pub id: u64,
    /// The microbatch.
    pub microbatch: u32,
    /// The group: the layer.
    pub group: u32,
    /// How many requests.
    pub segments: usize,
}

/// One attention instance's request in a batch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepmeshSegment {
    /// The attention instance.
    pub rank: u32,
    /// Parts that were sent.
    pub parts: u32,
    /// The attention side's bytes.
    pub app: [u8; 16],
}

/// An FFN instance and the batches that its caller has in hand.
pub(crate) struct Ffn {
    pub(crate) mesh: FfnMesh,
    pub(crate) events: Events,
    batches: Vec<(u64, Batch)>,
    last_id: u64,
}

impl Ffn {
    pub(crate) fn new(mesh: FfnMesh) -> Self {
        Self { mesh, events: Events::default(), batches: Vec::new(), last_id: 0 }
    }

    pub(crate) fn collect_events(&mut self) {
        while let Some(event) = self.mesh.next_event() {
            if let Some(answer) = self.events.keep(&event) {
                // A scheduler that is lost is an event of its own.
                let _ = self.mesh.send_control(answer);
            }
        }
    }

    fn position(&self, id: u64) -> Result<usize, Failure> {
        let position = self.batches.iter().position(|(known, _)| *known == id);
        position.ok_or_else(|| Failure::unknown(format!("batch {id} is not in hand")))
    }

    fn segment(&mut self, id: u64, index: usize) -> Result<&mut Segment, Failure> {
        let position = self.position(id)?;
        let segments = &mut self.batches[position].1.segments;
        let count = segments.len();
        segments.get_mut(index).ok_or_else(|| Failure::unknown(format!("segment {index} of {count}")))
    }
}

/// Waits for the next batch that the policy (a StepmeshPolicy, with its value) allows. TIMEOUT when there is none
/// yet, and earlier when an event has come. Every batch must be answered with stepmesh_respond: one that is kept
/// holds up its attention instances, and after a minute the members of a link that has ended meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_next_batch(
    handle: u64,
    policy: u32,
    value: u32,
    timeout_ms: u32,
    batch: *mut StepmeshBatch,
) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract.
        let out = unsafe { arguments::out(batch, "batch") }?;
        let policy = match policy {
            kind if kind == StepmeshPolicy::All as u32 => Policy::All,
            kind if kind == StepmeshPolicy::Any as u32 => Policy::Any,
            kind if kind == StepmeshPolicy::AtLeast as u32 => Policy::AtLeast(value as usize),
            kind if kind == StepmeshPolicy::Deadline as u32 => Policy::Deadline(Duration::from_millis(value.into())),
            other => return Err(Failure::invalid(format!("{other} is no policy"))),
        };
        let timeout = Duration::from_millis(timeout_ms.into());
        with_ffn(handle, |ffn| {
            let nothing = || Failure::new(StepmeshStatus::Timeout, "no batch yet");
            let batch = ffn.mesh.next_batch(policy, timeout)?.ok_or_else(nothing)?;
            ffn.last_id += 1;
            let (id, microbatch, group) = (ffn.last_id, batch.microbatch.into(), batch.group);
            out.write(StepmeshBatch { id, microbatch, group, segments: batch.segments.len() });
            ffn.batches.push((id, batch));
            Ok(())
        })
    })
}

/// Who sent a segment of a batch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_segment(
    handle: u64,
    batch: u64,
    segment: usize,
    out: *mut StepmeshSegment,
) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract.
        let out = unsafe { arguments::out(out, "out") }?;
        with_ffn(handle, |ffn| {
            let segment = ffn.segment(batch, segment)?;
            let (rank, parts) = (segment.rank() as u32, segment.parts().len() as u32);
            out.write(StepmeshSegment { rank, parts, app: segment.app() });
            Ok(())
        })
    })
}

/// A part that a segment's attention instance sent. The bytes hold until stepmesh_respond.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_segment_part(
    handle: u64,
    batch: u64,
    segment: usize,
    part: u32,
    tensor: *mut StepmeshTensor,
) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract.
        let out = unsafe { arguments::out(tensor, "tensor") }?;
        with_ffn(handle, |ffn| {
            let segment = ffn.segment(batch, segment)?;
            let sent = segment.parts().get(part as usize);
            let sent = sent.ok_or_else(|| Failure::unknown(format!("part {part} was not sent")))?;
            out.write(StepmeshTensor::new(sent, segment.part_place(part as usize)));
            Ok(())
        })
    })
}

/// Where a part of the reply to a segment is to be put: *bytes bytes at *data, until stepmesh_respond.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_segment_reply(
    handle: u64,
    batch: u64,
    segment: usize,
    part: u32,
    data: *mut *mut c_void,
    bytes: *mut usize,
) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract, for both.
        let (data, bytes) = unsafe { (arguments::out(data, "data")?, arguments::out(bytes, "bytes")?) };
        with_ffn(handle, |ffn| {
            let place = ffn.segment(batch, segment)?.reply_place(part as usize).filter(|(_, range)| !range.is_empty());
            let place = place.ok_or_else(|| Failure::unknown(format!("a reply has no part {part}")))?;
            bytes.write(place.1.len());
            data.write(address(&place));
            Ok(())
        })
    })
}

/// Says which parts of the reply to a segment are in use. Without it the reply is empty.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_segment_set_reply(
    handle: u64,
    batch: u64,
    segment: usize,
    parts: *const StepmeshPart,
    part_count: usize,
) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract.
        let parts = unsafe { Parts::read(parts, part_count) }?;
        with_ffn(handle, |ffn| Ok(ffn.segment(batch, segment)?.set_reply(parts.in_use())?))
    })
}

/// Answers that a segment could not be processed. At most 16 bytes of the reason travel; null says nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_segment_fail(
    handle: u64,
    batch: u64,
    segment: usize,
    reason: *const c_char,
) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract.
        let reason = unsafe { arguments::text(reason, "reason") }?.unwrap_or_default();
        with_ffn(handle, |ffn| {
            ffn.segment(batch, segment)?.fail(&reason);
            Ok(())
        })
    })
}

/// Sends every segment's reply; the batch is no longer in hand, whatever the status. Segments whose attention instance
/// is gone are dropped: its loss is an event.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_respond(handle: u64, batch: u64) -> StepmeshStatus {
    guard(|| {
        with_ffn(handle, |ffn| {
            let position = ffn.position(batch)?;
            let (_, batch) = ffn.batches.swap_remove(position);
            Ok(ffn.mesh.respond(batch)?)
        })
    })
}
