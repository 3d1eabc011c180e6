//! Joining: options as C says them, a device, a session with the scheduler, and the wait until it has admitted us.

use crate::arguments;
use crate::attention::Attention;
use crate::ffn::Ffn;
use crate::members::{Member, insert};
use crate::status::{Failure, StepmeshStatus, guard};
use std::ffi::c_char;
use std::time::Duration;
use stepmesh_embed::Joining;
use stepmesh_mesh::control::{ConnectOptions, Token};
use stepmesh_mesh::{MemberOptions, PartSpec, SlotLayout};
use stepmesh_proto::MAX_PARTS;
use stepmesh_transport::{DeviceOptions, Provider};

/// How tensors travel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepmeshTransport {
    /// Processes of one host.
    Shm = 0,
    /// Any two hosts.
    Tcp = 1,
    /// Hosts with RDMA; libibverbs is loaded when it is asked for.
    Verbs = 2,
}

/// Room for one part of a transfer: at most max_rows * row_bytes bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepmeshPartSpec {
    /// Bytes of the widest row.
    pub row_bytes: u32,
    /// Most rows.
    pub max_rows: u32,
}

/// How a member joins. Set it to zero, then what differs: zero and null are the defaults, but for the scheduler and
/// the layout. All members of a deployment must agree on transport, lanes, layout and workload.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepmeshOptions {
    /// The scheduler's address, http://host:port.
    pub scheduler: *const c_char,
    /// The cluster's token; null if the scheduler asks for none.
    pub token: *const c_char,
    /// For people: what the others call this member in their messages.
    pub name: *const c_char,
    /// What is computed, for comparison between members.
    pub workload: *const c_char,
    /// A StepmeshTransport.
    pub transport: u32,
    /// Lanes of each link, 1 to 8; zero means 1.
    pub lanes: u32,
    /// tcp: the IP address that peers dial; null means 127.0.0.1.
    pub address: *const c_char,
    /// One more than the rank to ask for; zero means the lowest free one.
    pub rank_plus_one: u32,
    /// Microbatches, each with one slot per peer and direction.
    pub microbatches: u32,
    /// The parts of a request, at most 8.
    pub request: *const StepmeshPartSpec,
    /// How many.
    pub request_parts: usize,
    /// The parts of a reply, at most 8.
    pub reply: *const StepmeshPartSpec,
    /// How many.
    pub reply_parts: usize,
    /// Most bytes of registered memory; zero means 4 GiB.
    pub memory_limit_bytes: u64,
    /// How long to look for the scheduler, and then to wait to be admitted; zero means 30 s.
    pub join_timeout_ms: u32,
    /// One more than the GPU that the slots are to be on, as CUDA counts those that are visible; zero means host memory.
    /// Over tcp they are then page-locked host memory, which streams copy to and from.
    pub gpu_plus_one: u32,
}

/// The options, checked.
///
/// # Safety
/// The crate's contract.
unsafe fn read(options: *const StepmeshOptions) -> Result<Joining, Failure> {
    // SAFETY: the crate's contract.
    let given = unsafe { arguments::read(options, "options") }?;
    // SAFETY: the crate's contract, for all four.
    let [scheduler, token, name, workload] = unsafe {
        [
            arguments::text(given.scheduler, "scheduler")?,
            arguments::text(given.token, "token")?,
            arguments::text(given.name, "name")?,
            arguments::text(given.workload, "workload")?,
        ]
    };
    // SAFETY: the crate's contract.
    let address = unsafe { arguments::text(given.address, "address") }?;
    // SAFETY: the crate's contract.
    let (request, reply) =
        unsafe { (specs(given.request, given.request_parts)?, specs(given.reply, given.reply_parts)?) };
    let provider = match given.transport {
        transport if transport == StepmeshTransport::Shm as u32 => Provider::Shm,
        transport if transport == StepmeshTransport::Tcp as u32 => Provider::Tcp,
        transport if transport == StepmeshTransport::Verbs as u32 => Provider::Verbs,
        other => return Err(Failure::invalid(format!("{other} is no transport"))),
    };
    let mut device = DeviceOptions { gpu: given.gpu_plus_one.checked_sub(1), ..DeviceOptions::default() };
    if let Some(address) = address {
        device.address =
            address.parse().map_err(|_| Failure::invalid(format!("address `{address}` is no IP address")))?;
    }
    let microbatches = u16::try_from(given.microbatches)
        .map_err(|_| Failure::invalid(format!("{} microbatches are too many", given.microbatches)))?;
    let mut member = MemberOptions::new(SlotLayout::new(microbatches, request, reply)?, workload.unwrap_or_default());
    member.name = name.unwrap_or_else(|| "C".to_owned());
    member.rank = given.rank_plus_one.checked_sub(1);
    member.lanes = u8::try_from(given.lanes.max(1))
        .map_err(|_| Failure::invalid(format!("{} lanes are too many", given.lanes)))?;
    if given.memory_limit_bytes > 0 {
        member.memory_limit_bytes = usize::try_from(given.memory_limit_bytes).unwrap_or(usize::MAX);
    }
    let timeout = if given.join_timeout_ms == 0 { 30_000 } else { given.join_timeout_ms };
    let token = token.map(Token::new).transpose().map_err(|error| Failure::invalid(error.to_string()))?;
    let connect = ConnectOptions::new(scheduler.ok_or_else(|| Failure::invalid("scheduler is null"))?)
        .token(token)
        .timeout(Duration::from_millis(timeout.into()));
    Ok(Joining { member, connect, provider, device })
}

/// # Safety
/// The crate's contract.
unsafe fn specs(pointer: *const StepmeshPartSpec, count: usize) -> Result<Vec<PartSpec>, Failure> {
    // SAFETY: the crate's contract.
    let given = unsafe { arguments::slice(pointer, count, MAX_PARTS, "parts in the layout") }?;
    Ok(given.iter().map(|spec| PartSpec { row_bytes: spec.row_bytes, max_rows: spec.max_rows }).collect())
}

/// Joins as an attention instance and returns when the scheduler has admitted this member. The links come up while
/// calls are made: see stepmesh_wait_complete.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_join_attention(options: *const StepmeshOptions, handle: *mut u64) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract, for both.
        let (out, joining) = unsafe { (arguments::out(handle, "handle")?, read(options)?) };
        let microbatches = joining.member.layout.microbatches();
        let mesh = joining.attention(|| false)?;
        out.write(insert(mesh.waker(), Member::Attention(Attention::new(mesh, microbatches))));
        Ok(())
    })
}

/// Joins as an FFN instance; otherwise as stepmesh_join_attention.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_join_ffn(options: *const StepmeshOptions, handle: *mut u64) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract, for both.
        let (out, joining) = unsafe { (arguments::out(handle, "handle")?, read(options)?) };
        let mesh = joining.ffn(|| false)?;
        out.write(insert(mesh.waker(), Member::Ffn(Ffn::new(mesh))));
        Ok(())
    })
}
