//! Runs the processes of a deployment: starts them, hears what they say, notices an end, and leaves none behind.
//!
//! An end is learnt from SIGCHLD, so nothing polls. Children get a process group of their own, so that Ctrl-C reaches
//! this process only, which then stops them in order. A child that sees this process vanish ends itself
//! ([`crate::guard`]).

use crate::error::CliError;
use crate::program;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, PipeReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// Lines of each child that are kept for the case that it fails.
const LINES_KEPT: usize = 64;
/// How long the last lines of children that have ended may take to arrive.
const HEAR_OUT: Duration = Duration::from_millis(100);
/// How long children that are dropped may take to end, and how often they are looked at.
const DROP_GRACE: Duration = Duration::from_secs(2);
const DROP_POLL: Duration = Duration::from_millis(5);

/// A child's position in the order of starting.
pub(crate) type ChildId = usize;

/// What a child is started with.
pub(crate) struct ChildSpec {
    /// What people call it: "ffn 1".
    pub(crate) label: String,
    /// Its arguments; the first is its role.
    pub(crate) arguments: Vec<OsString>,
    /// Variables, for what must not be in the process list.
    pub(crate) environment: Vec<(&'static str, String)>,
}

/// What happens to the children.
#[derive(Debug)]
pub(crate) enum Event {
    /// One wrote a line, to standard output or standard error.
    Line(ChildId, String),
    /// One ended, and how: "ffn 1 (pid 12) was killed by signal 9".
    Ended(ChildId, Ending),
}

/// How a child ended.
#[derive(Clone, Debug)]
pub(crate) struct Ending {
    /// For people.
    pub(crate) message: String,
    /// Its exit code, if it ended by itself.
    pub(crate) code: Option<i32>,
}

struct Member {
    label: String,
    child: Child,
    ended: Option<ExitStatus>,
    lines: VecDeque<String>,
    /// Whether all that it will ever say is in `lines`.
    silent: bool,
}

/// A line of a child; none follows the `None`.
type Said = (ChildId, Option<String>);

/// The children of this process.
pub(crate) struct Supervisor {
    members: Vec<Member>,
    changed: Signal,
    lines: mpsc::UnboundedReceiver<Said>,
    writer: mpsc::UnboundedSender<Said>,
    verbose: bool,
}

impl Supervisor {
    /// Without children yet. `verbose`: what they say is passed on to standard error.
    pub(crate) fn new(verbose: bool) -> Result<Self, CliError> {
        let changed = signal(SignalKind::child()).map_err(CliError::system("watch for the end of processes"))?;
        let (writer, lines) = mpsc::unbounded_channel();
        Ok(Self { members: Vec::new(), changed, lines, writer, verbose })
    }

    /// Starts one more. Call it from the thread that stays: a child ends with the thread that started it.
    pub(crate) fn start(&mut self, spec: ChildSpec) -> Result<ChildId, CliError> {
        let id = self.members.len();
        let failed = || CliError::system("start a process");
        let (reader, output) = std::io::pipe().map_err(failed())?;
        let errors = output.try_clone().map_err(failed())?;
        let mut command = Command::new(program::path());
        command.arg0(program::name()).args(&spec.arguments).arg("--supervised-by").arg(std::process::id().to_string());
        if self.verbose {
            command.arg("--verbose");
        }
        for (name, _) in std::env::vars_os() {
            // What the children are told, they are told by flag; but for where libraries are.
            let tells = |name: &str| name.starts_with("STEPMESH_") || name.starts_with("DMLC_");
            if name.to_str().is_some_and(|name| tells(name) && !stepmesh_model::cuda::LIBRARIES.contains(&name)) {
                command.env_remove(name);
            }
        }
        command.envs(spec.environment).stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        let child = command.spawn().map_err(failed())?;
        self.members.push(Member { label: spec.label, child, ended: None, lines: VecDeque::new(), silent: false });
        let writer = self.writer.clone();
        std::thread::Builder::new().spawn(move || pass_lines_on(id, reader, &writer)).map_err(failed())?;
        Ok(id)
    }

    /// What people call a child, and its process id.
    pub(crate) fn describe(&self, id: ChildId) -> (&str, u32) {
        self.members.get(id).map_or(("?", 0), |member| (&member.label, member.child.id()))
    }

    /// The next line or end. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Event {
        loop {
            // A child's last words are read before its end is told.
            while let Ok((id, line)) = self.lines.try_recv() {
                if let Some(event) = self.keep(id, line) {
                    return event;
                }
            }
            if let Some(event) = self.find_ended() {
                return event;
            }
            tokio::select! {
                Some((id, line)) = self.lines.recv() => if let Some(event) = self.keep(id, line) { return event },
                _ = self.changed.recv() => {}
            }
        }
    }

    fn keep(&mut self, id: ChildId, line: Option<String>) -> Option<Event> {
        let member = self.members.get_mut(id)?;
        let Some(line) = line else {
            member.silent = true;
            return None;
        };
        if self.verbose {
            crate::output::complain(&format!("[{}] {line}", member.label));
        }
        if member.lines.len() == LINES_KEPT {
            member.lines.pop_front();
        }
        member.lines.push_back(line.clone());
        Some(Event::Line(id, line))
    }

    fn find_ended(&mut self) -> Option<Event> {
        self.members.iter_mut().enumerate().find_map(|(id, member)| {
            let status = match member.ended {
                Some(_) => return None,
                None => member.child.try_wait().ok().flatten()?,
            };
            member.ended = Some(status);
            let message = format!("{} (pid {}) {}", member.label, member.child.id(), how(status));
            Some(Event::Ended(id, Ending { message, code: status.code() }))
        })
    }

    /// Whether lines were shown when they came.
    pub(crate) fn is_verbose(&self) -> bool {
        self.verbose
    }

    /// The last lines of one child.
    pub(crate) fn lines_of(&self, id: ChildId) -> impl Iterator<Item = &str> {
        self.members.get(id).into_iter().flat_map(|member| member.lines.iter().map(String::as_str))
    }

    /// The last lines of all, each with its writer's name.
    pub(crate) fn last_words(&self) -> impl Iterator<Item = (&str, &str)> {
        self.members
            .iter()
            .flat_map(|member| member.lines.iter().map(move |line| (member.label.as_str(), line.as_str())))
    }

    /// Stops all: SIGTERM, `grace`, SIGKILL. All have ended and are reaped when it returns. Other tasks of this thread go
    /// on meanwhile, so that connections to the children are closed.
    pub(crate) async fn stop(&mut self, grace: Duration) {
        self.terminate();
        let ended = async {
            while self.members.iter_mut().any(Member::lives) {
                self.changed.recv().await;
            }
        };
        let _ = tokio::time::timeout(grace, ended).await;
        self.end();
        let hear_out = async {
            while self.members.iter().any(|member| !member.silent)
                && let Some((id, line)) = self.lines.recv().await
            {
                self.keep(id, line);
            }
        };
        let _ = tokio::time::timeout(HEAR_OUT, hear_out).await;
    }

    /// Asks all to end: members first, so that they can take their leave of the scheduler, the first child.
    fn terminate(&mut self) {
        self.members.iter_mut().rev().for_each(Member::terminate);
    }

    /// Ends and reaps those that are left.
    fn end(&mut self) {
        for member in self.members.iter_mut().filter(|member| member.ended.is_none()) {
            let _ = member.child.kill();
            member.ended = member.child.wait().ok();
        }
    }
}

/// However this process leaves its work, by an error or a panic: as [`Supervisor::stop`].
impl Drop for Supervisor {
    fn drop(&mut self) {
        self.terminate();
        let deadline = Instant::now() + DROP_GRACE;
        while self.members.iter_mut().any(Member::lives) && Instant::now() < deadline {
            std::thread::sleep(DROP_POLL);
        }
        self.end();
    }
}

impl Member {
    fn lives(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended.is_none()
    }

    fn terminate(&mut self) {
        // Not reaped yet, so the process id is still its own.
        if self.lives()
            && let Ok(id) = i32::try_from(self.child.id())
            && let Some(process) = rustix::process::Pid::from_raw(id)
        {
            let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
        }
    }
}

fn pass_lines_on(id: ChildId, reader: PipeReader, writer: &mpsc::UnboundedSender<Said>) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while let Ok(1..) = reader.read_until(b'\n', &mut line) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        if writer.send((id, Some(text))).is_err() {
            return;
        }
    }
    let _ = writer.send((id, None));
}

fn how(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("ended with exit code {code}"),
        (None, None) => "ended".into(),
    }
}
