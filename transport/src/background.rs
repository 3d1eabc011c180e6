//! Threads of which nothing is due within microseconds.

/// Has the calling thread wait while another one wants its CPU, instead of interrupting it: for a thread that looks after anything but
/// transfers and what is computed for them, and that others wake while they do that.
///
/// It is put into the system's class of batch work, and so are threads that it starts. Where the system refuses, all stays as it was.
pub fn into_background() {
    #[cfg(not(miri))]
    {
        let priority = libc::sched_param { sched_priority: 0 };
        // SAFETY: the call reads the structure, and touches nothing but how this thread is scheduled.
        unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const priority) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_goes_into_the_background_with_those_that_it_starts() {
        // SAFETY: asks for the calling thread's class.
        let class = || unsafe { libc::sched_getscheduler(0) };
        let classes = std::thread::spawn(move || {
            into_background();
            [class(), std::thread::spawn(class).join().unwrap()]
        });
        assert_eq!(classes.join().unwrap(), [libc::SCHED_BATCH; 2]);
        assert_eq!(class(), libc::SCHED_OTHER);
    }
}
