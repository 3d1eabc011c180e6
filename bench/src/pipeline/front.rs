//! Where sequences are asked for and their events come back: the scheduler in this process, or one that processes reach.

use crate::BenchError;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use stepmesh_mesh::control::{BlockingClient, ConnectOptions, ControlError, LocalScheduler};
use stepmesh_mesh::scheduler::{Background, SchedulerOptions, SequenceId, ServeOptions, spawn};
use stepmesh_proto::control::{GenerateRequest, generate_event, sequence_event};
use stepmesh_transport::into_background;

/// How long an event is waited for before one looks around: seldom, because it takes a CPU from one of the two sides.
const LOOK: Duration = Duration::from_millis(100);

/// A sequence's name in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sequence {
    Local(SequenceId),
    Remote(usize),
}

/// What one hears of it.
pub(super) enum News {
    /// A token, so long after the one before.
    Token(Duration),
    Finished,
    Failed(String),
    /// Nothing that matters here.
    Other,
}

pub(super) enum Front {
    Local(LocalScheduler),
    Remote(Remote),
}

/// A scheduler of processes, and a client of it.
pub(super) struct Remote {
    client: Arc<BlockingClient>,
    sequences: usize,
    sender: Sender<(usize, Result<generate_event::Body, ControlError>)>,
    events: Receiver<(usize, Result<generate_event::Body, ControlError>)>,
    /// Last, so that it is told of everybody's leaving.
    _scheduler: Background,
}

impl Remote {
    /// Listens on a free port of loopback; where.
    pub(super) fn start() -> Result<(Self, String), BenchError> {
        let scheduler = spawn(ServeOptions::new(SchedulerOptions::new(1, 1)))?;
        let url = scheduler.url();
        let client = Arc::new(BlockingClient::connect(&ConnectOptions::new(url.as_str()))?);
        let (sender, events) = channel();
        Ok((Self { client, sequences: 0, sender, events, _scheduler: scheduler }, url))
    }

    fn generate(&mut self, request: GenerateRequest) -> Result<(), BenchError> {
        let (client, sender, number) = (self.client.clone(), self.sender.clone(), self.sequences);
        self.sequences += 1;
        // It ends with its sequence.
        let follow = move || {
            into_background();
            match client.generate(request) {
                Err(error) => drop(sender.send((number, Err(error)))),
                Ok(events) => {
                    for event in events {
                        if sender.send((number, event)).is_err() {
                            return;
                        }
                    }
                }
            }
        };
        std::thread::Builder::new().spawn(follow).map_err(BenchError::system("starting a thread"))?;
        Ok(())
    }
}

impl Front {
    /// Asks for a sequence.
    pub(super) fn generate(&mut self, request: GenerateRequest) -> Result<(), BenchError> {
        match self {
            Self::Local(scheduler) => {
                let asked = scheduler.generate(request);
                asked.map(drop).map_err(|refusal| BenchError::Sequence(refusal.to_string()))
            }
            Self::Remote(remote) => remote.generate(request),
        }
    }

    /// The next news of any sequence, if there is some or some comes within a moment.
    pub(super) fn next(&mut self) -> Result<Option<(Sequence, News)>, BenchError> {
        match self {
            Self::Local(scheduler) => Ok(scheduler.next_sequence_event().map(|(sequence, event)| {
                use sequence_event::Body;
                let news = match event {
                    Body::Token(token) => News::Token(Duration::from_nanos(token.elapsed_ns)),
                    Body::Finished(_) => News::Finished,
                    Body::Failed(failed) => News::Failed(failed.message),
                    Body::Scores(_) => News::Other,
                };
                (Sequence::Local(sequence), news)
            })),
            Self::Remote(remote) => {
                use generate_event::Body;
                let Ok((number, event)) = remote.events.recv_timeout(LOOK) else { return Ok(None) };
                let news = match event? {
                    Body::Token(token) => News::Token(Duration::from_nanos(token.elapsed_ns)),
                    Body::Finished(_) => News::Finished,
                    Body::Failed(failed) => News::Failed(failed.message),
                    Body::Scores(_) => News::Other,
                };
                Ok(Some((Sequence::Remote(number), news)))
            }
        }
    }
}
