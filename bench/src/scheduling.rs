//! Whether the kernel may make a thread late: one that is real-time comes before everything ordinary that its CPU has to do.

use crate::BenchError;
use serde::Serialize;
use std::io;

/// How the kernel schedules the threads whose stages take their time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduling {
    /// One that wakes has its CPU at once; several take turns (`SCHED_RR`). Takes root, `CAP_SYS_NICE` or `ulimit -r`.
    RealTime,
    /// One that wakes may wait for what else its CPU is doing, the kernel's own threads too (`SCHED_OTHER`).
    Ordinary,
}

impl Scheduling {
    /// Real-time if this process may have that.
    pub fn best() -> Self {
        if Self::RealTime.check().is_ok() { Self::RealTime } else { Self::Ordinary }
    }

    /// Whether threads of this process may be scheduled so.
    ///
    /// # Errors
    /// [`BenchError::Scheduling`] if the kernel refuses.
    pub(crate) fn check(self) -> Result<(), BenchError> {
        // On a thread that is gone behind it.
        std::thread::spawn(move || self.apply()).join().unwrap_or(Err(BenchError::Thread))
    }

    /// Schedules the calling thread so.
    ///
    /// # Errors
    /// [`BenchError::Scheduling`] if the kernel refuses.
    pub(crate) fn apply(self) -> Result<(), BenchError> {
        let (policy, sched_priority) = match self {
            Self::RealTime => (libc::SCHED_RR, 1),
            Self::Ordinary => (libc::SCHED_OTHER, 0),
        };
        // SAFETY: reads a plain structure that lives until it returns; 0 is the calling thread.
        match unsafe { libc::sched_setscheduler(0, policy, &libc::sched_param { sched_priority }) } {
            0 => Ok(()),
            _ => Err(BenchError::Scheduling(io::Error::last_os_error())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says of the calling thread.
    fn policy() -> Option<i32> {
        let said = std::fs::read_to_string("/proc/thread-self/stat").ok()?;
        // Behind the name, which may hold spaces: the 41st field, of which the third is the first.
        said.rsplit_once(')')?.1.split_whitespace().nth(38)?.parse().ok()
    }

    #[test]
    fn what_is_best_is_what_the_kernel_makes_of_it_and_ordinary_again_afterwards() {
        assert_eq!(policy(), Some(libc::SCHED_OTHER));
        match Scheduling::best() {
            Scheduling::Ordinary => {
                let refusal = Scheduling::RealTime.apply().expect_err("refused");
                assert!(refusal.to_string().contains("CAP_SYS_NICE"), "{refusal}");
            }
            Scheduling::RealTime => {
                Scheduling::RealTime.apply().expect("allowed");
                assert_eq!(policy(), Some(libc::SCHED_RR));
                Scheduling::Ordinary.apply().expect("allowed to everybody");
            }
        }
        assert_eq!(policy(), Some(libc::SCHED_OTHER), "no other thread is touched either");
    }
}
