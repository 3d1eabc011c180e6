//! A client of the deployment: prompts, status, figures. Async, and blocking for those without a runtime.

use super::connect::{Stub, dial, refusal, url};
use super::{ConnectOptions, ControlError};
use std::fmt;
use std::time::{Duration, Instant};
use stepmesh_proto::control::generate_event::Body;
use stepmesh_proto::control::{
    GenerateEvent, GenerateRequest, Role, StatsReply, StatsRequest, StatusReply, StatusRequest,
};
use stepmesh_transport::into_background;
use tokio::runtime::{Handle, Runtime};
use tonic::Streaming;

/// How often the deployment is asked whether it is complete.
const COMPLETE_EVERY: Duration = Duration::from_millis(100);

/// A connection to the scheduler. Clones share it.
#[derive(Clone)]
pub struct Client {
    stub: Stub,
    url: String,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Client {
    /// Waits for the scheduler for as long as the options say.
    pub async fn connect(options: &ConnectOptions) -> Result<Self, ControlError> {
        Ok(Self { stub: dial(options).await?, url: url(&options.scheduler) })
    }

    /// Starts to decode a prompt.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, ControlError> {
        let started = self.stub.clone().generate(request).await;
        let events = started.map_err(|status| refusal(&self.url, &status))?.into_inner();
        Ok(Generation { events, url: self.url.clone(), over: false })
    }

    /// What the deployment looks like now.
    pub async fn status(&self) -> Result<StatusReply, ControlError> {
        let status = self.stub.clone().status(StatusRequest {}).await;
        Ok(status.map_err(|status| refusal(&self.url, &status))?.into_inner())
    }

    /// The figures of all attention instances since they were last reset; `reset` resets them.
    pub async fn stats(&self, reset: bool) -> Result<StatsReply, ControlError> {
        let stats = self.stub.clone().stats(StatsRequest { reset }).await;
        Ok(stats.map_err(|status| refusal(&self.url, &status))?.into_inner())
    }

    /// Waits until every rank is held and every link up.
    pub async fn wait_complete(&self, timeout: Duration) -> Result<StatusReply, ControlError> {
        let started = Instant::now();
        loop {
            let status = self.status().await?;
            if status.complete {
                return Ok(status);
            }
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(ControlError::NotReady(format!(
                    "the deployment was not complete within {timeout:?}: {}",
                    missing(&status)
                )));
            }
            tokio::time::sleep(left.min(COMPLETE_EVERY)).await;
        }
    }
}

/// What a deployment still lacks.
fn missing(status: &StatusReply) -> String {
    let peers = || status.members.iter().filter_map(|member| member.peer.as_ref());
    let attention = peers().filter(|peer| peer.role() == Role::Attention).count();
    let ffn = peers().filter(|peer| peer.role() == Role::Ffn).count();
    let links: u32 = status.members.iter().map(|member| member.links_up).sum::<u32>() / 2;
    format!(
        "{attention} of {} attention and {ffn} of {} FFN instances have joined, {links} of {} links are up",
        status.attention,
        status.ffn,
        u64::from(status.attention) * u64::from(status.ffn)
    )
}

/// A sequence being decoded. Dropping it cancels the sequence.
pub struct Generation {
    events: Streaming<GenerateEvent>,
    url: String,
    over: bool,
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation").field("over", &self.over).finish_non_exhaustive()
    }
}

impl Generation {
    /// The next event: tokens in order, then one `Finished` or `Failed`, then `None`.
    pub async fn next(&mut self) -> Result<Option<Body>, ControlError> {
        if self.over {
            return Ok(None);
        }
        let event = match self.events.message().await {
            Ok(Some(GenerateEvent { body: Some(event) })) => event,
            Ok(Some(_)) => return Err(self.lost("it sent an event that this release does not know")),
            Ok(None) => return Err(self.lost("it ended the stream before the sequence's end")),
            Err(status) => {
                self.over = true;
                return Err(refusal(&self.url, &status));
            }
        };
        self.over = matches!(event, Body::Finished(_) | Body::Failed(_));
        Ok(Some(event))
    }

    fn lost(&mut self, reason: &str) -> ControlError {
        self.over = true;
        ControlError::Lost(reason.to_owned())
    }
}

/// A [`Client`] for those without a runtime. Its calls block, and are refused on a thread that runs async code.
#[derive(Debug)]
pub struct BlockingClient {
    client: Client,
    runtime: Option<Runtime>,
}

impl BlockingClient {
    /// Waits for the scheduler for as long as the options say.
    pub fn connect(options: &ConnectOptions) -> Result<Self, ControlError> {
        // A thread of its own keeps the connection alive between the calls.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("stepmesh-client")
            .on_thread_start(into_background)
            .enable_all()
            .build()?;
        let client = block_on(Some(&runtime), Client::connect(options));
        match client {
            Ok(client) => Ok(Self { client, runtime: Some(runtime) }),
            Err(error) => {
                runtime.shutdown_background();
                Err(error)
            }
        }
    }

    /// Starts to decode a prompt; iterate over the events.
    pub fn generate(&self, request: GenerateRequest) -> Result<BlockingGeneration<'_>, ControlError> {
        let generation = block_on(self.runtime.as_ref(), self.client.generate(request))?;
        Ok(BlockingGeneration { generation, client: self })
    }

    /// What the deployment looks like now.
    pub fn status(&self) -> Result<StatusReply, ControlError> {
        block_on(self.runtime.as_ref(), self.client.status())
    }

    /// The figures of all attention instances since they were last reset; `reset` resets them.
    pub fn stats(&self, reset: bool) -> Result<StatsReply, ControlError> {
        block_on(self.runtime.as_ref(), self.client.stats(reset))
    }

    /// Waits until every rank is held and every link up.
    pub fn wait_complete(&self, timeout: Duration) -> Result<StatusReply, ControlError> {
        block_on(self.runtime.as_ref(), self.client.wait_complete(timeout))
    }
}

impl Drop for BlockingClient {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The events of a sequence. Dropping it cancels the sequence.
#[derive(Debug)]
pub struct BlockingGeneration<'a> {
    generation: Generation,
    client: &'a BlockingClient,
}

impl Iterator for BlockingGeneration<'_> {
    type Item = Result<Body, ControlError>;

    fn next(&mut self) -> Option<Self::Item> {
        block_on(self.client.runtime.as_ref(), self.generation.next()).transpose()
    }
}

/// Runs a call to its end, where a thread may be blocked.
fn block_on<T>(
    runtime: Option<&Runtime>,
    call: impl Future<Output = Result<T, ControlError>>,
) -> Result<T, ControlError> {
    match runtime {
        Some(runtime) if Handle::try_current().is_err() => runtime.block_on(call),
        _ => Err(ControlError::System(std::io::Error::other("a blocking client was called from async code"))),
    }
}
