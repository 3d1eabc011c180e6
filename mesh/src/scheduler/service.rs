//! The gRPC service: turns calls into the keeper's inputs, and its answers into streams.

use super::keeper::{Input, Reach};
use super::{GenerateRefusal, SequenceId, ServeOptions, Session};
use std::pin::Pin;
use std::sync::Arc;
use stepmesh_proto::control::scheduler_server::Scheduler;
use stepmesh_proto::control::{
    FromMember, GenerateEvent, GenerateRequest, StatsReply, StatsRequest, StatusReply, StatusRequest, ToMember,
};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Events of a sequence that wait for its client.
const EVENTS: usize = 1024;

/// What tonic serves.
pub(super) struct Service {
    reach: Reach,
    sessions: Arc<Semaphore>,
    max_sessions: usize,
    /// Messages that may wait for one member: every peer's introduction, offer and grants, and some epochs.
    outbox: usize,
}

impl Service {
    pub(super) fn new(reach: Reach, options: &ServeOptions) -> Self {
        let max_sessions = options.max_sessions.min(Semaphore::MAX_PERMITS);
        let outbox = options.deployment.members().saturating_mul(16).clamp(4096, 1 << 20);
        Self { reach, sessions: Arc::new(Semaphore::new(max_sessions)), max_sessions, outbox }
    }

    async fn ask<T>(&self, input: impl FnOnce(oneshot::Sender<T>) -> Input) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        let asked = self.reach.inputs.send(input(reply)).await;
        match asked {
            Ok(()) => answer.await.map_err(|_| shutting_down()),
            Err(_) => Err(shutting_down()),
        }
    }
}

fn shutting_down() -> Status {
    Status::unavailable(GenerateRefusal::Draining.to_string())
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Scheduler for Service {
    type JoinStream = Events<ToMember>;
    type GenerateStream = Events<GenerateEvent>;

    async fn join(&self, request: Request<Streaming<FromMember>>) -> Result<Response<Self::JoinStream>, Status> {
        let Ok(permit) = self.sessions.clone().try_acquire_owned() else {
            let limit = self.max_sessions;
            return Err(Status::resource_exhausted(format!("{limit} sessions are open, which is the limit")));
        };
        let (outbox, messages) = mpsc::channel(self.outbox);
        tokio::spawn(listen(request.into_inner(), outbox, self.reach.clone()));
        // The session counts until its stream is closed, so that members who do not read cannot pile up.
        let messages = ReceiverStream::new(messages).map(move |message| {
            let _counts = &permit;
            Ok(message)
        });
        Ok(Response::new(Box::pin(messages)))
    }

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let (events, taken) = mpsc::channel(EVENTS);
        let request = request.into_inner();
        let started = self.ask(|started| Input::Generate { request, events, started }).await?;
        let sequence = started.map_err(|refusal| {
            let message = refusal.to_string();
            match refusal {
                GenerateRefusal::NotReady { .. } => Status::failed_precondition(message),
                GenerateRefusal::Invalid(_) => Status::invalid_argument(message),
                GenerateRefusal::Overloaded(_) => Status::resource_exhausted(message),
                GenerateRefusal::Draining => Status::unavailable(message),
            }
        })?;
        let client = Client { sequence, reach: self.reach.clone() };
        let events = ReceiverStream::new(taken).map(move |event| {
            let _reads = &client;
            Ok(event)
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        self.ask(Input::Status).await.map(Response::new)
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Result<Response<StatsReply>, Status> {
        let StatsRequest { reset } = request.into_inner();
        self.ask(|reply| Input::Stats { reset, reply }).await.map(Response::new)
    }
}

/// The reader of a sequence's events; when it is dropped the sequence need not go on.
struct Client {
    sequence: SequenceId,
    reach: Reach,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.reach.gone.send(self.sequence).ok();
    }
}

/// A session: passes its messages on until it ends or is ended.
async fn listen(mut said: Streaming<FromMember>, outbox: mpsc::Sender<ToMember>, reach: Reach) {
    let (ended, mut is_ended) = oneshot::channel();
    let (opened, session) = oneshot::channel::<Session>();
    if reach.inputs.send(Input::Connected { outbox, ended, session: opened }).await.is_err() {
        return;
    }
    let Ok(session) = session.await else { return };
    let reason = loop {
        let message = tokio::select! {
            message = said.message() => message,
            _ = &mut is_ended => return,
        };
        match message {
            Ok(Some(message)) => {
                if reach.inputs.send(Input::Message(session, message)).await.is_err() {
                    return;
                }
            }
            Ok(None) => break "its session ended without a good-bye".to_owned(),
            Err(status) => break format!("its connection broke: {}", status.message()),
        }
    };
    reach.inputs.send(Input::Disconnected(session, reason)).await.ok();
}
