//! A whole deployment on this host: a scheduler and its daemons as children of this process.

use crate::client::{Client, Target};
use crate::error::CliError;
use crate::settings::{DeploymentSettings, Secret, read_token};
use crate::signals::Interrupt;
use crate::supervisor::{ChildId, ChildSpec, Ending, Event, Supervisor};
use std::collections::HashMap;
use std::ffi::OsString;
use std::future::Future;
use std::time::Duration;

/// How long children may take to stop.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// How long to listen, after a loss, to what the others say about it; and how long they may then take to stop.
const LAST_WORDS: Duration = Duration::from_millis(250);
const STOP_GRACE_AFTER_LOSS: Duration = Duration::from_millis(300);
/// How long a child may take to end when something failed that its end would explain.
const EXPLANATION: Duration = Duration::from_millis(500);
/// How a scheduler says where it listens, on a line of its own.
pub(crate) const LISTENING: &str = "listening ";
/// How a daemon says how many bytes of its weights it has read, and of how many: `loading 5 of 10 bytes`.
pub(crate) const LOADING: &str = "loading ";
/// How a daemon says that it was admitted.
pub(crate) const JOINED: &str = "joined ";
/// How a daemon says that the deployment is complete.
pub(crate) const READY: &str = "ready ";

/// Bytes read and in all, if `line` says so.
fn loaded(line: &str) -> Option<(u64, u64)> {
    let (done, total) = line.strip_prefix(LOADING)?.strip_suffix(" bytes")?.split_once(" of ")?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

/// The processes, and the way to their scheduler.
pub(crate) struct Deployment {
    supervisor: Supervisor,
    interrupt: Interrupt,
    target: Target,
}

/// What happens while a deployment comes up.
pub(crate) enum Progress<'a> {
    /// A process was started: its name and its id.
    Started(&'a str, u32),
    /// So many of so many daemons were admitted.
    Joined(usize, usize),
    /// Bytes of weights that all daemons have read, of those that they are to read as far as they have said.
    Loading { done: u64, total: u64 },
}

impl Deployment {
    /// Starts everything and returns when the deployment is complete.
    pub(crate) async fn start(
        settings: &DeploymentSettings,
        verbose: bool,
        observe: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self, CliError> {
        let token = read_token(settings.token.as_ref(), settings.token_file.as_deref())?;
        let interrupt = Interrupt::new()?;
        let target = Target { url: String::new(), token };
        let mut deployment = Self { supervisor: Supervisor::new(verbose)?, interrupt, target };
        let limit = Duration::from_millis(settings.start_timeout_ms);
        let error = match tokio::time::timeout(limit, deployment.bring_up(settings, observe)).await {
            Ok(Ok(())) => return Ok(deployment),
            Ok(Err(error)) => error,
            Err(_) => {
                deployment.show_last_words();
                CliError::failed(format!("the deployment is not complete after {limit:?}"))
            }
        };
        deployment.stop().await;
        Err(error)
    }

    async fn bring_up(
        &mut self,
        settings: &DeploymentSettings,
        observe: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), CliError> {
        let token = self.target.token.clone();
        let scheduler = self.supervisor.start(spec("scheduler", scheduler_arguments(settings), token.as_ref()))?;
        self.announce(scheduler, observe);
        self.target.url = self.heard(scheduler, LISTENING).await?;
        let daemons = (settings.attention.get() + settings.ffn.get()) as usize;
        for (role, count) in [("attention", settings.attention.get()), ("ffn", settings.ffn.get())] {
            for rank in 0..count {
                let arguments = daemon_arguments(role, rank, &self.target.url, settings);
                let child = self.supervisor.start(spec(&format!("{role} {rank}"), arguments, token.as_ref()))?;
                self.announce(child, observe);
            }
        }
        let target = self.target.clone();
        let mut complete = std::pin::pin!(async move { Client::connect(&target).await?.wait_complete().await });
        let (mut joined, mut loading) = (0, HashMap::new());
        loop {
            tokio::select! {
                biased;
                event = self.supervisor.next() => match event {
                    Event::Ended(child, ending) => return Err(self.explain(child, ending).await),
                    Event::Line(child, line) => if line.starts_with(JOINED) {
                        joined += 1;
                        observe(Progress::Joined(joined, daemons));
                    } else if let Some(read) = loaded(&line) {
                        loading.insert(child, read);
                        let (done, total) = loading.values().fold((0, 0), |sum, read| (sum.0 + read.0, sum.1 + read.1));
                        observe(Progress::Loading { done, total });
                    },
                },
                () = self.interrupt.arrived() => return Err(CliError::Interrupted),
                result = &mut complete => return result,
            }
        }
    }

    fn announce(&self, child: ChildId, observe: &mut dyn FnMut(Progress<'_>)) {
        let (label, id) = self.supervisor.describe(child);
        observe(Progress::Started(label, id));
    }

    /// The rest of the first line of `child` that starts with `prefix`.
    async fn heard(&mut self, child: ChildId, prefix: &str) -> Result<String, CliError> {
        loop {
            tokio::select! {
                event = self.supervisor.next() => match event {
                    Event::Line(from, line) if from == child => {
                        if let Some(rest) = line.strip_prefix(prefix) {
                            return Ok(rest.to_owned());
                        }
                    }
                    Event::Line(..) => {}
                    Event::Ended(child, ending) => return Err(self.explain(child, ending).await),
                },
                () = self.interrupt.arrived() => return Err(CliError::Interrupted),
            }
        }
    }

    /// Where requests go.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Does `work`, unless a process ends or a signal arrives first.
    pub(crate) async fn during<T>(&mut self, work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
        let result = tokio::select! {
            biased;
            (child, ending) = lost(&mut self.supervisor) => return Err(self.explain(child, ending).await),
            () = self.interrupt.arrived() => return Err(CliError::Interrupted),
            result = work => result,
        };
        // What failed may be the echo of a process that is about to be found dead.
        if result.is_err()
            && let Ok((child, ending)) = tokio::time::timeout(EXPLANATION, lost(&mut self.supervisor)).await
        {
            return Err(self.explain(child, ending).await);
        }
        result
    }

    /// Why the deployment is lost. Shows what the other processes said about it, and stops them.
    async fn explain(&mut self, child: ChildId, ending: Ending) -> CliError {
        let (mut first, mut ending) = (child, ending);
        let listen = async {
            loop {
                // Of several that end together, the one that was killed is the cause.
                match self.supervisor.next().await {
                    Event::Ended(child, other) if ending.code.is_some() && other.code.is_none() => {
                        (first, ending) = (child, other);
                    }
                    Event::Ended(..) | Event::Line(..) => {}
                }
            }
        };
        let _ = tokio::time::timeout(LAST_WORDS, listen).await;
        self.supervisor.stop(STOP_GRACE_AFTER_LOSS).await;
        self.show_last_words();
        let said = self.supervisor.lines_of(first).filter_map(|line| line.strip_prefix("error: ")).last();
        let message = match said {
            Some(said) => format!("{}: {said}", ending.message),
            None => ending.message,
        };
        let code = if ending.code == Some(2) { 2 } else { 1 };
        CliError::Lost { message, code }
    }

    /// What the processes said, unless it was shown when it came.
    fn show_last_words(&self) {
        if self.supervisor.is_verbose() {
            return;
        }
        for (label, line) in self.supervisor.last_words() {
            if ![LISTENING, JOINED, READY].iter().any(|news| line.starts_with(news)) {
                crate::output::complain(&format!("[{label}] {line}"));
            }
        }
    }

    /// Stops everything; all processes have ended when it returns.
    pub(crate) async fn stop(mut self) {
        self.supervisor.stop(STOP_GRACE).await;
    }
}

async fn lost(supervisor: &mut Supervisor) -> (ChildId, Ending) {
    loop {
        if let Event::Ended(child, ending) = supervisor.next().await {
            return (child, ending);
        }
    }
}

fn spec(label: &str, arguments: Vec<OsString>, token: Option<&Secret>) -> ChildSpec {
    let environment = token.map(|token| ("STEPMESH_TOKEN", token.reveal().to_owned())).into_iter().collect();
    ChildSpec { label: label.to_owned(), arguments, environment }
}

fn flag(name: &str, value: impl ToString) -> [OsString; 2] {
    [format!("--{name}").into(), value.to_string().into()]
}

fn scheduler_arguments(settings: &DeploymentSettings) -> Vec<OsString> {
    let flags = [
        flag("listen", settings.listen),
        flag("attention", settings.attention),
        flag("ffn", settings.ffn),
        flag("drain-timeout-ms", STOP_GRACE.as_millis()),
    ];
    let mut arguments = vec![OsString::from("scheduler")];
    arguments.extend(flags.into_iter().flatten());
    arguments.extend(settings.insecure.then(|| "--insecure".into()));
    arguments
}

fn daemon_arguments(role: &str, rank: u32, url: &str, settings: &DeploymentSettings) -> Vec<OsString> {
    let common = [
        flag("scheduler", url),
        flag("rank", rank),
        flag("transport", settings.transport),
        flag("dtype", settings.dtype),
        flag("wire", settings.wire.unwrap_or(settings.dtype)),
        flag("tensor-parallel", settings.tensor_parallel),
        flag("threads", settings.threads_each()),
        flag("microbatches", settings.microbatches),
        flag("lanes", settings.lanes),
        flag("max-rows", settings.max_rows),
        flag("memory-limit-mib", settings.memory_limit_mib),
        flag("spin-us", settings.spin_us),
        flag("slots", settings.slots),
        flag("drain-timeout-ms", STOP_GRACE.as_millis()),
    ];
    let own = match role {
        "attention" => flag("kv-tokens", settings.kv_tokens),
        _ => flag("policy", settings.policy),
    };
    let mut arguments = vec![OsString::from(role)];
    arguments.extend(common.into_iter().flatten().chain(own));
    arguments.extend(settings.gpu.into_iter().flat_map(|gpu| flag("gpu", gpu)));
    if let Some(directory) = &settings.checkpoint {
        arguments.extend([OsString::from("--checkpoint"), directory.into()]);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_says_how_much_it_has_read() {
        assert_eq!(loaded(&format!("{LOADING}5 of 10 bytes")), Some((5, 10)));
        for line in ["joined rank 0", "loading", "loading 5 of bytes", "loading x of 10 bytes", "loading 5 of 10"] {
            assert_eq!(loaded(line), None, "{line}");
        }
    }
}
