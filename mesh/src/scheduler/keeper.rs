//! The task that owns the state: takes what sessions and clients send, does what the state asks for.

use super::{Action, GenerateRefusal, SequenceId, Session, State, StatsId};
use std::collections::HashMap;
use std::future::Future;
use std::time::{Duration, Instant};
use stepmesh_proto::control::{
    FromMember, GenerateEvent, GenerateRequest, StatsReply, StatusReply, ToMember, generate_event,
    sequence_event::Body as Progress,
};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, sleep_until};

/// Inputs that wait for the state; those who send more wait with them.
const INPUTS: usize = 1024;

/// What sessions and clients want of the state.
pub(super) enum Input {
    /// A session opened. `outbox` is where its messages go; `ended` is dropped when the state ends it.
    Connected { outbox: mpsc::Sender<ToMember>, ended: oneshot::Sender<()>, session: oneshot::Sender<Session> },
    /// A session's message.
    Message(Session, FromMember),
    /// A session ended, and why.
    Disconnected(Session, String),
    /// A client's prompt.
    Generate {
        request: GenerateRequest,
        events: mpsc::Sender<GenerateEvent>,
        started: oneshot::Sender<Result<SequenceId, GenerateRefusal>>,
    },
    /// A client asks for the deployment's shape.
    Status(oneshot::Sender<StatusReply>),
    /// A client asks for figures.
    Stats { reset: bool, reply: oneshot::Sender<StatsReply> },
}

/// How sessions and clients reach the keeper.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    pub(super) inputs: mpsc::Sender<Input>,
    /// Sequences whose client is gone. Unbounded, for it is written to from destructors; at most one for each sequence.
    pub(super) gone: mpsc::UnboundedSender<SequenceId>,
}

impl Reach {
    pub(super) fn new() -> (Self, mpsc::Receiver<Input>, mpsc::UnboundedReceiver<SequenceId>) {
        let (inputs, taken) = mpsc::channel(INPUTS);
        let (gone, gone_taken) = mpsc::unbounded_channel();
        (Self { inputs, gone }, taken, gone_taken)
    }
}

struct Member {
    outbox: mpsc::Sender<ToMember>,
    _ended: oneshot::Sender<()>,
}

/// The state and the channels to everybody it speaks to.
pub(super) struct Keeper {
    state: State,
    inputs: mpsc::Receiver<Input>,
    gone: mpsc::UnboundedReceiver<SequenceId>,
    members: HashMap<Session, Member>,
    sequences: HashMap<SequenceId, mpsc::Sender<GenerateEvent>>,
    questions: HashMap<StatsId, oneshot::Sender<StatsReply>>,
}

impl Keeper {
    pub(super) fn new(state: State, inputs: mpsc::Receiver<Input>, gone: mpsc::UnboundedReceiver<SequenceId>) -> Self {
        let (members, sequences, questions) = Default::default();
        Self { state, inputs, gone, members, sequences, questions }
    }

    /// Serves until `shutdown`, then for at most `drain` until everybody has left.
    pub(super) async fn run(mut self, shutdown: impl Future<Output = ()>, drain: Duration) {
        {
            let serve = self.serve();
            tokio::select! {
                () = serve => return,
                () = shutdown => {}
            }
        }
        self.state.drain();
        self.act();
        let deadline = sleep(drain);
        tokio::pin!(deadline);
        while !self.state.is_deserted() {
            tokio::select! {
                more = self.step() => if !more { return },
                () = &mut deadline => return,
            }
        }
    }

    async fn serve(&mut self) {
        while self.step().await {}
    }

    /// Takes one input or the passing of time; `false` when nobody can send any more. May be cancelled.
    async fn step(&mut self) -> bool {
        let tick = self.state.next_tick();
        tokio::select! {
            input = self.inputs.recv() => match input {
                Some(input) => self.take(input),
                None => return false,
            },
            Some(sequence) = self.gone.recv() => {
                self.sequences.remove(&sequence);
                self.state.cancel(sequence);
            }
            () = sleep_until(tick.unwrap_or_else(Instant::now).into()), if tick.is_some() => {
                self.state.tick(Instant::now());
            }
        }
        self.act();
        true
    }

    fn take(&mut self, input: Input) {
        let now = Instant::now();
        match input {
            Input::Connected { outbox, ended, session } => {
                let opened = self.state.connected(now);
                if session.send(opened).is_ok() {
                    self.members.insert(opened, Member { outbox, _ended: ended });
                } else {
                    self.state.disconnected(opened, "it hung up");
                }
            }
            Input::Message(session, message) => self.state.message(session, message, now),
            Input::Disconnected(session, reason) => self.lose(session, &reason),
            Input::Generate { request, events, started } => {
                let start = self.state.generate(request);
                if let Ok(sequence) = start {
                    self.sequences.insert(sequence, events);
                }
                // A client that is already gone has dropped its events too, which the first event finds out.
                started.send(start).ok();
            }
            Input::Status(reply) => drop(reply.send(self.state.status())),
            Input::Stats { reset, reply } => {
                let question = self.state.stats(reset, now);
                self.questions.insert(question, reply);
            }
        }
    }

    fn lose(&mut self, session: Session, reason: &str) {
        self.members.remove(&session);
        self.state.disconnected(session, reason);
    }

    fn act(&mut self) {
        while let Some(action) = self.state.next_action() {
            match action {
                Action::Send { session, message } => {
                    let Some(member) = self.members.get(&session) else { continue };
                    match member.outbox.try_send(message) {
                        Ok(()) => {}
                        Err(TrySendError::Full(_)) => {
                            let waiting = member.outbox.max_capacity();
                            self.lose(session, &format!("it does not read: {waiting} messages wait for it"));
                        }
                        Err(TrySendError::Closed(_)) => self.lose(session, "its connection is closed"),
                    }
                }
                Action::End { session, .. } => drop(self.members.remove(&session)),
                Action::Deliver { sequence, event } => self.deliver(sequence, event),
                Action::Answer { request, reply } => {
                    self.questions.remove(&request).map(|question| question.send(reply));
                }
                Action::Note(event) if event.is_warning() => tracing::warn!("{event}"),
                Action::Note(event) => tracing::info!("{event}"),
            }
        }
    }

    fn deliver(&mut self, sequence: SequenceId, event: Progress) {
        let Some(client) = self.sequences.get(&sequence) else { return };
        let (body, last) = match event {
            Progress::Token(token) => (generate_event::Body::Token(token), false),
            Progress::Scores(scores) => (generate_event::Body::Scores(scores), false),
            Progress::Finished(finished) => (generate_event::Body::Finished(finished), true),
            Progress::Failed(failed) => (generate_event::Body::Failed(failed), true),
        };
        let unread = client.try_send(GenerateEvent { body: Some(body) }).is_err();
        if unread || last {
            self.sequences.remove(&sequence);
        }
        if unread {
            self.state.cancel(sequence);
        }
    }
}
