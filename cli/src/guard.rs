//! Ends a supervised process with its supervisor, however that one ends: no process outlives the command that started it.

use crate::error::CliError;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// Asks the kernel for SIGTERM when the supervisor is gone. A process that does not obey SIGTERM in time is ended by
/// [`crate::signals`].
pub(crate) fn end_with(supervisor: u32) -> Result<(), CliError> {
    set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|error| CliError::System { doing: "tie this process to its supervisor", source: error.into() })?;
    // It may have died before the line above.
    let expected = i32::try_from(supervisor).ok().and_then(Pid::from_raw);
    if getppid() != expected {
        return Err(CliError::failed(format!("the supervising process {supervisor} is gone")));
    }
    Ok(())
}
