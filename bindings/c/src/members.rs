//! The members of this process by their handles, and what both sides can be asked.

use crate::arguments;
use crate::attention::Attention;
use crate::event::{Events, StepmeshEvent};
use crate::ffn::Ffn;
use crate::status::{Failure, StepmeshStatus, guard};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, TryLockError};
use std::time::Duration;
use stepmesh_mesh::MeshError;
use stepmesh_transport::Waker;

/// One member of either side.
#[allow(clippy::large_enum_variant, reason = "one a handle, never moved")]
pub(crate) enum Member {
    Attention(Attention),
    Ffn(Ffn),
}

impl Member {
    fn events(&mut self) -> &mut Events {
        match self {
            Self::Attention(attention) => &mut attention.events,
            Self::Ffn(ffn) => &mut ffn.events,
        }
    }

    fn poll(&mut self) -> Result<(), MeshError> {
        match self {
            Self::Attention(attention) => attention.mesh.poll(),
            Self::Ffn(ffn) => ffn.mesh.poll(),
        }
    }

    fn collect_events(&mut self) {
        match self {
            Self::Attention(attention) => attention.collect_events(),
            Self::Ffn(ffn) => ffn.collect_events(),
        }
    }
}

/// A member, and the way to wake whoever waits in one of its calls.
struct Entry {
    waker: Waker,
    member: Mutex<Member>,
}

static MEMBERS: RwLock<BTreeMap<u64, Arc<Entry>>> = RwLock::new(BTreeMap::new());
static LAST_HANDLE: AtomicU64 = AtomicU64::new(0);

/// Gives a member its handle, which no other member of this process ever has.
pub(crate) fn insert(waker: Waker, member: Member) -> u64 {
    let handle = LAST_HANDLE.fetch_add(1, Ordering::Relaxed) + 1;
    let entry = Arc::new(Entry { waker, member: Mutex::new(member) });
    MEMBERS.write().unwrap_or_else(PoisonError::into_inner).insert(handle, entry);
    handle
}

fn find(handle: u64) -> Result<Arc<Entry>, Failure> {
    let members = MEMBERS.read().unwrap_or_else(PoisonError::into_inner);
    members.get(&handle).cloned().ok_or_else(|| Failure::unknown(format!("{handle} is no member's handle")))
}

/// Does something with a member, alone.
pub(crate) fn with<T>(handle: u64, body: impl FnOnce(&mut Member) -> Result<T, Failure>) -> Result<T, Failure> {
    let entry = find(handle)?;
    let mut member = match entry.member.try_lock() {
        Ok(member) => member,
        Err(TryLockError::WouldBlock) => {
            return Err(Failure::new(StepmeshStatus::Busy, "another call on this handle is under way"));
        }
        Err(TryLockError::Poisoned(_)) => {
            return Err(Failure::new(StepmeshStatus::Panic, "an earlier call met a bug in stepmesh: close the handle"));
        }
    };
    let result = body(&mut member);
    member.collect_events();
    result
}

/// As [`with`], on an attention instance.
pub(crate) fn with_attention<T>(
    handle: u64,
    body: impl FnOnce(&mut Attention) -> Result<T, Failure>,
) -> Result<T, Failure> {
    with(handle, |member| match member {
        Member::Attention(attention) => body(attention),
        Member::Ffn(_) => Err(Failure::unknown(format!("{handle} is an FFN instance, not an attention instance"))),
    })
}

/// As [`with`], on an FFN instance.
pub(crate) fn with_ffn<T>(handle: u64, body: impl FnOnce(&mut Ffn) -> Result<T, Failure>) -> Result<T, Failure> {
    with(handle, |member| match member {
        Member::Ffn(ffn) => body(ffn),
        Member::Attention(_) => {
            Err(Failure::unknown(format!("{handle} is an attention instance, not an FFN instance")))
        }
    })
}

/// What a member is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepmeshMember {
    /// Its rank on its side.
    pub rank: u32,
    /// Instances of the other side.
    pub peers: u32,
    /// Not zero: every rank is held and every link is up.
    pub complete: u32,
}

/// Says what a member is. Makes no progress.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_describe(handle: u64, member: *mut StepmeshMember) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract.
        let out = unsafe { arguments::out(member, "member") }?;
        out.write(with(handle, |member| {
            let (rank, peers, complete) = match member {
                Member::Attention(Attention { mesh, .. }) => (mesh.rank(), mesh.ffn(), mesh.is_complete()),
                Member::Ffn(Ffn { mesh, .. }) => (mesh.rank(), mesh.attention(), mesh.is_complete()),
            };
            Ok(StepmeshMember { rank: rank.unwrap_or_default(), peers: peers as u32, complete: complete.into() })
        })?);
        Ok(())
    })
}

/// Waits until every rank is held and every link is up.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_wait_complete(handle: u64, timeout_ms: u32) -> StepmeshStatus {
    guard(|| {
        let timeout = Duration::from_millis(timeout_ms.into());
        with(handle, |member| match member {
            Member::Attention(attention) => Ok(attention.mesh.wait_complete(timeout)?),
            Member::Ffn(ffn) => Ok(ffn.mesh.wait_complete(timeout)?),
        })
    })
}

/// Makes progress without blocking. `events`, if not null, gets the number of events that wait for
/// stepmesh_next_event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_poll(handle: u64, events: *mut usize) -> StepmeshStatus {
    guard(|| {
        with(handle, |member| {
            let polled = member.poll();
            member.collect_events();
            // SAFETY: the crate's contract.
            if let Some(events) = unsafe { events.as_mut() } {
                *events = member.events().len();
            }
            Ok(polled?)
        })
    })
}

/// Takes the oldest event. Its kind is STEPMESH_EVENT_KIND_NONE if there is none. Makes no progress. At most 1024
/// events are kept; beyond that the oldest are dropped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stepmesh_next_event(handle: u64, event: *mut StepmeshEvent) -> StepmeshStatus {
    guard(|| {
        // SAFETY: the crate's contract.
        let out = unsafe { arguments::out(event, "event") }?;
        out.write(with(handle, |member| Ok(member.events().take()))?);
        Ok(())
    })
}

/// Wakes the call that sleeps on this handle in another thread, or the next one that would: it looks again whether
/// what it waits for is there, and at its deadline. May be called at any time.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_wake(handle: u64) -> StepmeshStatus {
    guard(|| {
        find(handle)?.waker.wake();
        Ok(())
    })
}

/// Leaves the mesh and frees the member with all its memory. The handle is unknown from then on. Takes at most about
/// a second to say good-bye.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_close(handle: u64) -> StepmeshStatus {
    guard(|| {
        let entry = find(handle)?;
        if let Err(TryLockError::WouldBlock) = entry.member.try_lock() {
            return Err(Failure::new(StepmeshStatus::Busy, "another call on this handle is under way"));
        }
        let removed = MEMBERS.write().unwrap_or_else(PoisonError::into_inner).remove(&handle);
        drop((entry, removed));
        Ok(())
    })
}
