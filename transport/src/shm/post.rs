//! Posting a chain: it is checked as a whole, then each work is done at once, by copying.

use super::MAX_INLINE;
use super::connection::Connection;
use super::copy::copy;
use super::ring::{CAPACITY, Nonsense};
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
        let Some(producer) = self.producers.get_mut(index) else {
            return Err(Unposted::Error(PostError::Invalid(format!(
                "lane {lane} of a link with {} lanes",
                self.producers.len()
            ))));
        };
        if self.unreported[index] + signals > CAPACITY || !producer.has_room(immediates)? {
            self.blocked = true;
            return Err(Unposted::Error(PostError::WouldBlock));
        }
        for work in chain {
            let result = if self.is_open() { self.perform(index, &work.op) } else { Err(WorkError::Flushed) };
            if result == Err(WorkError::RemoteAccess) {
                self.refuse();
            }
            // What is flushed is told only if it was signalled.
            if work.signal.is_some() || result == Err(WorkError::RemoteAccess) {
                self.unreported[index] += 1;
                ready.push_back(Completion::Sent { link, lane, token: work.signal.unwrap_or(u64::MAX), result });
            }
        }
        if immediates > 0 {
            self.bell.ring();
        }
        Ok(())
    }

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
    fn resolve(&self, remote: &Remote<'_>, len: usize, access: Access) -> Result<NonNull<u8>, WorkError> {
        let import = self.imported(remote.region.key).filter(|import| import.access >= access);
        let import = import.ok_or(WorkError::RemoteAccess)?;
        let start = usize::try_from(remote.offset).map_err(|_| WorkError::RemoteAccess)?;
        let end = start.checked_add(len).ok_or(WorkError::RemoteAccess)?;
        import.region.at(start..end).map_err(|_| WorkError::RemoteAccess)
    }
}

/// The immediates and the signals of a chain, whose local side is found to be sound.
fn count(chain: &[Work<'_>]) -> Result<(usize, usize), PostError> {
    let invalid = |what: String| Err(PostError::Invalid(what));
    let (mut immediates, mut signals) = (0, 0);
    for Work { op, signal } in chain {
        match op {
            Op::Write { source, .. } => sound(source)?,
            Op::WriteImmediate { source, remote, .. } => {
                sound(source)?;
                if remote.is_none() && !source.is_empty() {
                    return invalid(format!("{} bytes to write, and no place to write them to", source.len()));
                }
                immediates += 1;
            }
            Op::Read { target, .. } => sound_target(target)?,
            Op::FetchAdd { remote, target, .. } => {
                check_fetch_add(remote, target)?;
                sound_target(target)?;
            }
        }
        signals += usize::from(signal.is_some());
    }
    if chain.len() > CAPACITY {
        return invalid(format!("a chain of {} works; a lane holds {CAPACITY}", chain.len()));
    }
    Ok((immediates, signals))
}

fn sound(source: &Source<'_>) -> Result<(), PostError> {
    match source {
        Source::Inline(bytes) if bytes.len() > MAX_INLINE => {
            Err(PostError::Invalid(format!("{} bytes inline; at most {MAX_INLINE}", bytes.len())))
        }
        Source::Inline(_) => Ok(()),
        Source::Region(region, offset, len) => region.check_local(Provider::Shm, *offset, *len),
    }
}

fn sound_target(target: &Target<'_>) -> Result<(), PostError> {
    let Target { region, offset, len } = target;
    region.check_local(Provider::Shm, *offset, *len)?;
    if region.writable() {
        Ok(())
    } else {
        Err(PostError::Invalid("the target of a read is mapped read-only here".into()))
    }
}
