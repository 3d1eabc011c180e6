//! How a call ended, and the words for it.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use stepmesh_embed::JoinError;
use stepmesh_mesh::control::ControlError;
use stepmesh_mesh::{MeshError, TicketFailure};
use stepmesh_transport::TransportError;

/// How a call ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepmeshStatus {
    /// As asked.
    Ok = 0,
    /// An argument is null, out of its range, or does not fit the layout. Nothing was changed.
    Invalid = 1,
    /// No such handle, ticket, batch, segment, part or reply (any more), or a handle of the other side.
    Unknown = 2,
    /// Another call on the handle is under way. Nothing was changed.
    Busy = 3,
    /// The microbatch is in use: by a buffer, a ticket, or a reply that is under way.
    WouldBlock = 4,
    /// The deadline passed. What was waited for is still outstanding.
    Timeout = 5,
    /// Not every FFN instance is linked (yet, or any more). Poll and try again.
    NotLinked = 6,
    /// The ticket failed: the link to a peer ended before its reply. The ticket is consumed.
    PeerLost = 7,
    /// The ticket failed: a peer could not process the request. The ticket is consumed.
    PeerFailed = 8,
    /// The ticket was cancelled and is consumed.
    Cancelled = 9,
    /// The scheduler refused this member, or its token.
    Refused = 10,
    /// The scheduler cannot be reached, or is lost.
    SchedulerLost = 11,
    /// The provider or the system refused or failed.
    Transport = 12,
    /// A bug in stepmesh was caught. Close the handle.
    Panic = 13,
}

/// A status that is not `Ok`, and its words.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: StepmeshStatus,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(status: StepmeshStatus, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StepmeshStatus::Invalid, message)
    }

    pub(crate) fn unknown(message: impl Into<String>) -> Self {
        Self::new(StepmeshStatus::Unknown, message)
    }
}

impl From<MeshError> for Failure {
    fn from(error: MeshError) -> Self {
        let status = match &error {
            MeshError::Layout(_) | MeshError::Transfer(_) | MeshError::Memory { .. } => StepmeshStatus::Invalid,
            MeshError::NoMicrobatch { .. } => StepmeshStatus::Invalid,
            MeshError::Refused(_) => StepmeshStatus::Refused,
            MeshError::SchedulerLost(_) => StepmeshStatus::SchedulerLost,
            MeshError::WouldBlock(_) => StepmeshStatus::WouldBlock,
            MeshError::NotLinked(_) => StepmeshStatus::NotLinked,
            MeshError::Timeout(_) => StepmeshStatus::Timeout,
            MeshError::UnknownTicket(_) => StepmeshStatus::Unknown,
            MeshError::Ticket(TicketFailure::PeerLost { .. }) => StepmeshStatus::PeerLost,
            MeshError::Ticket(TicketFailure::PeerFailed { .. }) => StepmeshStatus::PeerFailed,
            MeshError::Ticket(TicketFailure::Cancelled) => StepmeshStatus::Cancelled,
            _ => StepmeshStatus::Transport,
        };
        Self::new(status, error.to_string())
    }
}

impl From<TransportError> for Failure {
    fn from(error: TransportError) -> Self {
        Self::new(StepmeshStatus::Transport, error.to_string())
    }
}

impl From<JoinError> for Failure {
    fn from(error: JoinError) -> Self {
        match error {
            JoinError::Transport(error) => error.into(),
            JoinError::Control(error) => error.into(),
            JoinError::Mesh(error) => error.into(),
            error => Self::new(StepmeshStatus::Cancelled, error.to_string()),
        }
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let status = match &error {
            ControlError::Address { .. } => StepmeshStatus::Invalid,
            ControlError::Unauthenticated { .. }
            | ControlError::Version { .. }
            | ControlError::Refused(_)
            | ControlError::Overloaded(_) => StepmeshStatus::Refused,
            ControlError::System(_) => StepmeshStatus::Transport,
            _ => StepmeshStatus::SchedulerLost,
        };
        Self::new(status, error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs a call's body; nothing unwinds out of it.
pub(crate) fn guard(body: impl FnOnce() -> Result<(), Failure>) -> StepmeshStatus {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return StepmeshStatus::Ok,
        Ok(Err(failure)) => failure,
        Err(_) => Failure::new(StepmeshStatus::Panic, "a bug in stepmesh was caught: close the handle"),
    };
    let words = CString::new(failure.message.replace('\0', " ")).unwrap_or_default();
    let _ = LAST.try_with(|last| last.replace(words));
    failure.status
}

/// What the last call of this thread that failed has to say. Never null. Holds until the next call of this thread
/// that fails.
#[unsafe(no_mangle)]
pub extern "C" fn stepmesh_last_error_message() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn last() -> &'static str {
        // SAFETY: never null, terminated, and read before the next failure.
        unsafe { CStr::from_ptr(stepmesh_last_error_message()) }.to_str().unwrap()
    }

    #[test]
    fn a_panic_becomes_a_status() {
        assert_eq!(guard(|| panic!("not out of here")), StepmeshStatus::Panic);
        assert!(last().contains("close the handle"));
    }

    #[test]
    fn a_failure_leaves_its_words_to_the_thread() {
        assert_eq!(guard(|| Err(Failure::invalid("part\0 9"))), StepmeshStatus::Invalid);
        assert_eq!(last(), "part  9");
        std::thread::spawn(|| assert_eq!(last(), "")).join().unwrap();
        assert_eq!(guard(|| Ok(())), StepmeshStatus::Ok);
        assert_eq!(last(), "part  9");
    }
}
