//! Finding the scheduler: patient with one that is not there yet, clear about one that will not do.

use super::{ControlError, Token};
use std::error::Error;
use std::time::{Duration, Instant};
use stepmesh_proto::WIRE_VERSION;
use stepmesh_proto::control::scheduler_client::SchedulerClient;
use stepmesh_proto::control::{CONTROL_VERSION, StatusReply, StatusRequest};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// The wait between two attempts.
const RETRY: Duration = Duration::from_millis(100);
/// The longest that one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Answers in a row that no scheduler gives, before we believe that it is none.
const STRANGE_ANSWERS: u32 = 5;
/// The longest message that is read: a status of thousands of members, a token with its logits.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Where the scheduler is and how to speak to it.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// `http://host:port`, or `host:port`.
    pub scheduler: String,
    /// What the scheduler asks for, if it asks.
    pub token: Option<Token>,
    /// How long to look for the scheduler: members may be started before it.
    pub timeout: Duration,
    /// How often an idle connection is asked for a sign of life, and how long that may take.
    pub keepalive: Duration,
}

impl ConnectOptions {
    /// Looks for the scheduler for ten seconds, without a token.
    pub fn new(scheduler: impl Into<String>) -> Self {
        Self {
            scheduler: scheduler.into(),
            token: None,
            timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(5),
        }
    }

    /// Shows this token.
    pub fn token(mut self, token: Option<Token>) -> Self {
        self.token = token;
        self
    }

    /// Looks for the scheduler for this long.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

/// A connection whose calls show the token.
pub(super) type Stub = SchedulerClient<InterceptedService<Channel, ShowToken>>;

/// Adds the token to every call.
#[derive(Clone)]
pub(super) struct ShowToken(Option<MetadataValue<Ascii>>);

impl Interceptor for ShowToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(header) = &self.0 {
            request.metadata_mut().insert("authorization", header.clone());
        }
        Ok(request)
    }
}

/// How an attempt failed.
enum Failure {
    /// Trying again is no use.
    Final(ControlError),
    /// Nobody is there, or not ready yet.
    Absent(String),
    /// Somebody is there who does not speak as a scheduler does.
    Strange(String),
}

/// Connects to the scheduler and checks that it is one, that it takes the token and that it is of our release.
pub(super) async fn dial(options: &ConnectOptions) -> Result<Stub, ControlError> {
    let url = url(&options.scheduler);
    let endpoint = endpoint(&url, options.keepalive)?;
    let token = options.token.as_ref().map(|token| header(&url, token)).transpose()?;
    let started = Instant::now();
    let mut strange = 0;
    loop {
        let left = options.timeout.saturating_sub(started.elapsed());
        let patience = left.clamp(RETRY, ATTEMPT);
        let failure = match tokio::time::timeout(patience, attempt(&url, &endpoint, &token)).await {
            Ok(Ok(stub)) => return Ok(stub),
            Ok(Err(failure)) => failure,
            Err(_) => Failure::Strange(format!("no answer within {patience:?}")),
        };
        let waited = options.timeout;
        let is_last = left <= RETRY;
        match failure {
            Failure::Final(error) => return Err(error),
            Failure::Absent(reason) if is_last => return Err(ControlError::Unreachable { url, waited, reason }),
            Failure::Absent(_) => strange = 0,
            Failure::Strange(reason) => {
                strange += 1;
                if is_last || strange >= STRANGE_ANSWERS {
                    return Err(ControlError::NotScheduler { url, reason });
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn attempt(url: &str, endpoint: &Endpoint, token: &Option<MetadataValue<Ascii>>) -> Result<Stub, Failure> {
    let channel = endpoint.connect().await.map_err(|error| Failure::Absent(root_cause(&error)))?;
    let channel = InterceptedService::new(channel, ShowToken(token.clone()));
    let mut stub = SchedulerClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    match stub.status(StatusRequest {}).await {
        Ok(reply) => check_versions(url, reply.get_ref()).map(|()| stub).map_err(Failure::Final),
        Err(status) => Err(match status.code() {
            Code::Unauthenticated | Code::Unimplemented => Failure::Final(refusal(url, &status)),
            Code::Unavailable => Failure::Absent(words(&status)),
            _ => Failure::Strange(words(&status)),
        }),
    }
}

/// The address with its scheme.
pub(super) fn url(scheduler: &str) -> String {
    let scheduler = scheduler.trim();
    let scheduler = scheduler.strip_suffix('/').filter(|bare| !bare.ends_with('/')).unwrap_or(scheduler);
    if scheduler.contains("://") { scheduler.to_owned() } else { format!("http://{scheduler}") }
}

fn endpoint(url: &str, keepalive: Duration) -> Result<Endpoint, ControlError> {
    let refused = |reason: String| ControlError::Address { url: url.to_owned(), reason };
    if !url.starts_with("http://") {
        return Err(refused("only http:// is spoken".to_owned()));
    }
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| refused(root_cause(&error)))?;
    Ok(endpoint
        .connect_timeout(ATTEMPT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(keepalive)
        .keep_alive_timeout(keepalive)
        .keep_alive_while_idle(true))
}

fn header(url: &str, token: &Token) -> Result<MetadataValue<Ascii>, ControlError> {
    let refused = |_| ControlError::Unauthenticated { url: url.to_owned(), reason: "it fits no header".to_owned() };
    let mut header = MetadataValue::try_from(token.header()).map_err(refused)?;
    header.set_sensitive(true);
    Ok(header)
}

fn check_versions(url: &str, reply: &StatusReply) -> Result<(), ControlError> {
    let versions =
        [("control", CONTROL_VERSION, reply.control_version), ("wire", u32::from(WIRE_VERSION), reply.wire_version)];
    match versions.into_iter().find(|(_, ours, theirs)| ours != theirs) {
        None => Ok(()),
        Some((protocol, ours, theirs)) => Err(ControlError::Version { url: url.to_owned(), protocol, ours, theirs }),
    }
}

/// What a call's failure means.
pub(super) fn refusal(url: &str, status: &Status) -> ControlError {
    let (url, reason) = (url.to_owned(), words(status));
    match status.code() {
        Code::Unauthenticated => ControlError::Unauthenticated { url, reason },
        Code::Unimplemented => ControlError::NotScheduler { url, reason },
        Code::FailedPrecondition => ControlError::NotReady(reason),
        Code::InvalidArgument | Code::OutOfRange => ControlError::Refused(reason),
        Code::ResourceExhausted => ControlError::Overloaded(reason),
        _ => ControlError::Lost(reason),
    }
}

/// The failure's own words, with those of what lies beneath.
pub(super) fn words(status: &Status) -> String {
    let message = status.message();
    match status.source().map(root_cause) {
        Some(cause) if !message.contains(&cause) => format!("{message}: {cause}"),
        _ if message.is_empty() => status.code().description().to_owned(),
        _ => message.to_owned(),
    }
}

fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}
