//! A deployment's scheduler as commands see it: requests, figures, and refusals in this command's own errors.

use crate::decode::Request;
use crate::error::CliError;
use crate::settings::Secret;
use std::time::Duration;
use stepmesh_mesh::control::{self, ConnectOptions, ControlError, Generation, Token};
use stepmesh_proto::control::generate_event::Body;
use stepmesh_proto::control::{Bucket, GenerateRequest, MemberStats, StatusReply, failed};

/// How long a scheduler is looked for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Where requests go, and what they show there.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) url: String,
    pub(crate) token: Option<Secret>,
}

/// A connection. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Client(control::Client);

/// One token of a sequence.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) token: u32,
    pub(crate) elapsed_ns: u64,
    pub(crate) logits: Vec<u8>,
}

/// What one attention instance measured: latencies as (nanoseconds, how often).
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) a2f: Vec<(u64, u64)>,
    pub(crate) f2a: Vec<(u64, u64)>,
    pub(crate) stalled_ns: u64,
    pub(crate) busy_ns: u64,
}

impl Client {
    /// Waits for a scheduler that may not listen yet.
    pub(crate) async fn connect(target: &Target) -> Result<Self, CliError> {
        let token = target.token.as_ref().map(Secret::token).transpose()?;
        let options = ConnectOptions::new(&target.url).token(token).timeout(CONNECT_TIMEOUT);
        Ok(Self(control::Client::connect(&options).await?))
    }

    /// Waits until every daemon is there and linked; for how long is the caller's business.
    pub(crate) async fn wait_complete(&self) -> Result<(), CliError> {
        self.0.wait_complete(Duration::MAX).await?;
        Ok(())
    }

    /// What the deployment looks like now.
    pub(crate) async fn status(&self) -> Result<StatusReply, ControlError> {
        self.0.status().await
    }

    /// Starts one sequence, whose events come as they happen; it is cancelled when they are dropped.
    pub(crate) async fn start(&self, request: GenerateRequest) -> Result<Generation, ControlError> {
        self.0.generate(request).await
    }

    /// Decodes one sequence; `observe` sees each token as it comes.
    pub(crate) async fn generate(&self, request: Request, mut observe: impl FnMut(Piece)) -> Result<(), CliError> {
        let mut events = self.start(request.into()).await?;
        loop {
            match events.next().await? {
                Some(Body::Scores(_)) => {}
                Some(Body::Token(token)) => {
                    observe(Piece { token: token.token, elapsed_ns: token.elapsed_ns, logits: token.logits });
                }
                Some(Body::Finished(_)) => return Ok(()),
                Some(Body::Failed(failure)) if failure.kind() == failed::Kind::Invalid => {
                    return Err(CliError::plain_input(failure.message));
                }
                Some(Body::Failed(failure)) => return Err(CliError::failed(failure.message)),
                None => return Err(CliError::failed("the scheduler ended the sequence without a word")),
            }
        }
    }

    /// All attention instances' figures since the last reset.
    pub(crate) async fn stats(&self, reset: bool) -> Result<Vec<Figures>, CliError> {
        Ok(self.0.stats(reset).await?.members.into_iter().map(Figures::from).collect())
    }
}

impl From<Request> for GenerateRequest {
    fn from(request: Request) -> Self {
        Self {
            prompt: request.prompt,
            max_new_tokens: request.max_new_tokens,
            ignore_eos: request.ignore_eos,
            logits: request.logits,
            sampling: request.sampling,
            ..Self::default()
        }
    }
}

impl From<MemberStats> for Figures {
    fn from(stats: MemberStats) -> Self {
        let pairs = |buckets: Vec<Bucket>| buckets.into_iter().map(|bucket| (bucket.value_ns, bucket.count)).collect();
        Self { a2f: pairs(stats.a2f), f2a: pairs(stats.f2a), stalled_ns: stats.stalled_ns, busy_ns: stats.busy_ns }
    }
}

impl Secret {
    /// As the control plane wants it.
    pub(crate) fn token(&self) -> Result<Token, CliError> {
        Token::new(self.reveal()).map_err(|error| CliError::plain_input(error.to_string()))
    }
}

impl From<ControlError> for CliError {
    fn from(error: ControlError) -> Self {
        match &error {
            ControlError::Address { .. } | ControlError::Refused(_) | ControlError::Overloaded(_) => {
                Self::plain_input(error.to_string())
            }
            ControlError::Unauthenticated { .. } => Self::input(
                error.to_string(),
                "give the scheduler's token with --token-file or the variable STEPMESH_TOKEN",
            ),
            _ => Self::failed(error.to_string()),
        }
    }
}
