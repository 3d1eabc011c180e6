//! Posting a chain: it is checked as a whole, then each work is done at once, by copying.

use super::MAX_INLINE;
use super::connection::Connection;
use super::ring::{CAPACITY, Nonsense};
use crate::copy::copy_for_peer as copy;
use crate::endpoint::check_fetch_add;
use crate::{Access, Completion, LinkId, Op, PostError, Provider, Remote, Source, Target, Work, WorkError};
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a chain was not posted.
pub(super) enum Unposted {
    /// To be told to the caller.
    Error(PostError),
    /// The peer scribbled over the ring.
    Nonsense,
}

impl From<Nonsense> for Unposted {
    fn from(_: Nonsense) -> Self {
        Self::Nonsense
    }
}

impl Connection {
    /// Does a chain, and reports what was signalled or refused. Behind a refused work, and until the caller has seen
    /// the end of the link, everything is flushed.
    pub(super) fn post(
        &mut self,
        link: LinkId,
        lane: u8,
        chain: &[Work<'_>],
        ready: &mut VecDeque<Completion>,
    ) -> Result<(), Unposted> {
        let (immediates, signals) = count(chain).map_err(Unposted::Error)?;
        let index = usize::from(lane);
        let lanes = self.producers.len();
        let Some(producer) = self.producers.get_mut(index) else { return Err(no_lane(lane, lanes)) };
        let is_full = signals > 0 && self.unreported[index] + signals > CAPACITY;
        if is_full || (immediates > 0 && !producer.has_room(immediates)?) {
            self.blocked = true;
            return Err(Unposted::Error(PostError::WouldBlock));
        }
        for work in chain {
            let result = if self.is_open() { self.perform(index, &work.op) } else { Err(WorkError::Flushed) };
            if work.signal.is_some() || result.is_err() {
                self.report(link, lane, work.signal, result, ready);
            }
        }
        if immediates > 0 {
            self.bell.ring();
        }
        Ok(())
    }

    /// Keeps for the next poll how a work ended. What is flushed is told only if it was signalled.
    #[inline(never)]
    fn report(
        &mut self,
        link: LinkId,
        lane: u8,
        signal: Option<u64>,
        result: Result<(), WorkError>,
        ready: &mut VecDeque<Completion>,
    ) {
        let refused = result == Err(WorkError::RemoteAccess);
        if refused {
            self.refuse();
        }
        if signal.is_some() || refused {
            self.unreported[usize::from(lane)] += 1;
            ready.push_back(Completion::Sent { link, lane, token: signal.unwrap_or(u64::MAX), result });
        }
    }

    #[inline]
    fn perform(&mut self, lane: usize, op: &Op<'_>) -> Result<(), WorkError> {
        match op {
            Op::Write { source, remote } => self.write(source, Some(remote)),
            Op::WriteImmediate { source, remote, immediate } => {
                self.write(source, remote.as_ref())?;
                self.producers[lane].push(*immediate);
                Ok(())
            }
            Op::Read { remote, target } => {
                let Target { region, offset, len } = target;
                let from = self.resolve(remote, *len, Access::PeerRead)?;
                // SAFETY: `from` is `len` readable bytes by `resolve`; the target's range was checked by `count`.
                unsafe { copy(from.as_ptr(), region.base().add(*offset).as_ptr(), *len) };
                Ok(())
            }
            Op::FetchAdd { remote, target: Target { region, offset, len }, add } => {
                let place = self.resolve(remote, *len, Access::PeerWrite)?;
                // SAFETY: `place` is eight writable bytes by `resolve`, at a multiple of eight by `count`: a region begins
                // at a page.
                let number = unsafe { AtomicU64::from_ptr(place.as_ptr().cast()) };
                let before = number.fetch_add(*add, Ordering::SeqCst).to_ne_bytes();
                // SAFETY: the target's eight bytes were checked by `count`.
                unsafe { copy(before.as_ptr(), region.base().add(*offset).as_ptr(), *len) };
                Ok(())
            }
        }
    }

    #[inline]
    fn write(&self, source: &Source<'_>, remote: Option<&Remote<'_>>) -> Result<(), WorkError> {
        let Some(remote) = remote.filter(|_| !source.is_empty()) else { return Ok(()) };
        let to = self.resolve(remote, source.len(), Access::PeerWrite)?;
        let from = match source {
            Source::Inline(bytes) => bytes.as_ptr(),
            // SAFETY: the range was checked by `count`.
            Source::Region(region, offset, _) => unsafe { region.base().add(*offset).as_ptr() },
        };
        // SAFETY: `from` is valid for the source's length; `to` is as many writable bytes by `resolve`.
        unsafe { copy(from, to.as_ptr(), source.len()) };
        Ok(())
    }

    /// Where a place in a peer's region is mapped, if the peer has granted `access` to `len` bytes there: by what came
    /// over the link, whatever the caller's value says.
    #[inline]
    fn resolve(&self, remote: &Remote<'_>, len: usize, access: Access) -> Result<NonNull<u8>, WorkError> {
        let import = self.imported(remote.region.key).filter(|import| import.access >= access);
        let import = import.ok_or(WorkError::RemoteAccess)?;
        let start = usize::try_from(remote.offset).map_err(|_| WorkError::RemoteAccess)?;
        import.region.find(start, len).ok_or(WorkError::RemoteAccess)
    }
}

/// The immediates and the signals of a chain, whose local side is found to be sound.
#[inline]
fn count(chain: &[Work<'_>]) -> Result<(usize, usize), PostError> {
    let (mut immediates, mut signals) = (0, 0);
    for Work { op, signal } in chain {
        if !is_sound_write(op) {
            check(op)?;
        }
        immediates += usize::from(matches!(op, Op::WriteImmediate { .. }));
        signals += usize::from(signal.is_some());
    }
    if chain.len() > CAPACITY { Err(too_long(chain.len())) } else { Ok((immediates, signals)) }
}

/// What nearly all work is, seen at a glance; [`check`] has the last word on the rest.
#[inline]
fn is_sound_write(op: &Op<'_>) -> bool {
    match op {
        Op::Write { source: Source::Region(region, offset, len), .. }
        | Op::WriteImmediate { source: Source::Region(region, offset, len), remote: Some(_), .. } => {
            region.find(*offset, *len).is_some()
        }
        Op::WriteImmediate { source: Source::Inline(bytes), remote: Some(_), .. } => bytes.len() <= MAX_INLINE,
        _ => false,
    }
}

#[inline(never)]
fn check(op: &Op<'_>) -> Result<(), PostError> {
    let sound = |source: &Source<'_>| match source {
        Source::Inline(bytes) if bytes.len() > MAX_INLINE => {
            Err(PostError::Invalid(format!("{} bytes inline; at most {MAX_INLINE}", bytes.len())))
        }
        Source::Inline(_) => Ok(()),
        Source::Region(region, offset, len) => region.check_local(Provider::Shm, *offset, *len),
    };
    let sound_target = |Target { region, offset, len }: &Target<'_>| {
        region.check_local(Provider::Shm, *offset, *len)?;
        if region.writable() {
            Ok(())
        } else {
            Err(PostError::Invalid("the target of a read is mapped read-only here".into()))
        }
    };
    match op {
        Op::WriteImmediate { source, remote: None, .. } if !source.is_empty() => {
            sound(source)?;
            Err(PostError::Invalid(format!("{} bytes to write, and no place to write them to", source.len())))
        }
        Op::Write { source, .. } | Op::WriteImmediate { source, .. } => sound(source),
        Op::Read { target, .. } => sound_target(target),
        Op::FetchAdd { remote, target, .. } => {
            check_fetch_add(remote, target)?;
            sound_target(target)
        }
    }
}

#[cold]
fn no_lane(lane: u8, lanes: usize) -> Unposted {
    Unposted::Error(PostError::Invalid(format!("lane {lane} of a link with {lanes} lanes")))
}

#[cold]
fn too_long(works: usize) -> PostError {
    PostError::Invalid(format!("a chain of {works} works; a lane holds {CAPACITY}"))
}
