//! The scheduler as a gRPC server: where it listens, who may speak to it, how it ends.

use super::keeper::{Keeper, Reach};
use super::service::Service;
use super::{OptionsError, SchedulerOptions, State, system_secrets};
use crate::control::Token;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::Duration;
use stepmesh_proto::control::scheduler_server::SchedulerServer;
use stepmesh_transport::into_background;
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server as Transport;

/// How often an idle connection is asked for a sign of life, and how long that may take.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// The longest that connections may take to close once the sessions have ended.
const CLOSING: Duration = Duration::from_secs(2);
/// The wait after a connection that could not be accepted, for example for want of file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Where and how the scheduler serves.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// The address to listen on; port 0 is any free one.
    pub listen: SocketAddr,
    /// What callers must show; everybody is served without it.
    pub token: Option<Token>,
    /// Allows another address than loopback without a token.
    pub insecure: bool,
    /// Sessions at the same time; those that have not said Hello count.
    pub max_sessions: usize,
    /// The longest message that is read, in bytes.
    pub max_message_bytes: usize,
    /// The longest that members may take to finish and leave at a shutdown.
    pub drain: Duration,
    /// The deployment.
    pub deployment: SchedulerOptions,
}

impl ServeOptions {
    /// Serves a deployment on a free port of loopback, without a token.
    pub fn new(deployment: SchedulerOptions) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            token: None,
            insecure: false,
            max_sessions: deployment.members().saturating_mul(2).saturating_add(64),
            max_message_bytes: 16 << 20,
            drain: Duration::from_secs(10),
            deployment,
        }
    }
}

/// Why the scheduler does not serve.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Others than this host could give orders.
    #[error(
        "{address} can be reached from other hosts: give a token, listen on 127.0.0.1, or say --insecure if the \
         network is trusted"
    )]
    Open {
        /// The address asked for.
        address: SocketAddr,
    },
    /// Somebody listens there already.
    #[error("{address} is in use: another scheduler may be running; choose another port or stop it")]
    InUse {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The system refused the address.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// The deployment makes no sense.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The system refused a thread or a runtime.
    #[error("cannot start the scheduler's thread: {0}")]
    Thread(io::Error),
    /// The server broke.
    #[error("the gRPC server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// A scheduler that listens, and serves once it is [`run`](Self::run).
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    state: State,
    options: ServeOptions,
}

impl Server {
    /// Checks the options and listens.
    pub async fn bind(options: ServeOptions) -> Result<Self, ServeError> {
        let address = options.listen;
        if !address.ip().is_loopback() && options.token.is_none() && !options.insecure {
            return Err(ServeError::Open { address });
        }
        let state = State::new(options.deployment.clone(), system_secrets())?;
        let refused = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ServeError::InUse { address },
            _ => ServeError::Bind { address, source },
        };
        let listener = TcpListener::bind(address).await.map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        Ok(Self { listener, address, state, options })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`, then asks the members to leave and ends.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self { listener, address, state, options } = self;
        let (reach, inputs, gone) = Reach::new();
        let service = Service::new(reach, &options);
        let service = SchedulerServer::new(service).max_decoding_message_size(options.max_message_bytes);
        let token = options.token.clone();
        let guarded = InterceptedService::new(service, move |request| admit(token.as_ref(), request));
        let (quiet, is_quiet) = oneshot::channel::<()>();
        let transport = Transport::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .max_concurrent_streams(4096)
            .add_service(guarded)
            .serve_with_incoming_shutdown(accept(listener), async {
                is_quiet.await.ok();
            });
        tokio::pin!(transport);
        tracing::info!(%address, "the scheduler serves");
        let keeper = Keeper::new(state, inputs, gone).run(shutdown, options.drain);
        tokio::select! {
            () = keeper => {}
            broken = &mut transport => return Ok(broken?),
        }
        drop(quiet);
        match tokio::time::timeout(CLOSING, transport).await {
            Ok(closed) => Ok(closed?),
            Err(_) => Ok(()),
        }
    }
}

/// A scheduler on a thread of its own. Dropping it shuts it down.
#[derive(Debug)]
pub struct Background {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Serves on a thread of its own; it listens when this returns.
pub fn spawn(options: ServeOptions) -> Result<Background, ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Thread)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let (bound, is_bound) = std::sync::mpsc::sync_channel(1);
    let serve = async move {
        let server = match Server::bind(options).await {
            Ok(server) => server,
            Err(error) => return drop(bound.send(Err(error))),
        };
        bound.send(Ok(server.address())).ok();
        let shutdown = async {
            stopped.await.ok();
        };
        if let Err(error) = server.run(shutdown).await {
            tracing::error!(%error, "the scheduler ended");
        }
    };
    let serve = move || {
        into_background();
        runtime.block_on(serve);
        runtime.shutdown_background();
    };
    let thread =
        std::thread::Builder::new().name("stepmesh-scheduler".to_owned()).spawn(serve).map_err(ServeError::Thread)?;
    let address = is_bound.recv().map_err(|_| ServeError::Thread(io::Error::other("it ended at once")))??;
    Ok(Background { address, stop: Some(stop), thread: Some(thread) })
}

impl Background {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its address as members and clients are told it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Lets a call through that shows the token.
fn admit(token: Option<&Token>, request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
    let Some(token) = token else { return Ok(request) };
    match request.metadata().get("authorization") {
        Some(header) if token.matches(header.as_bytes()) => Ok(request),
        Some(_) => Err(tonic::Status::unauthenticated("the token is wrong")),
        None => Err(tonic::Status::unauthenticated("this scheduler asks for a token, and none was shown")),
    }
}

/// The connections, for ever: one that cannot be accepted is no reason to stop serving.
fn accept(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> {
    let (connections, accepted) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let connection = tokio::select! {
                connection = listener.accept() => connection,
                () = connections.closed() => return,
            };
            match connection {
                Ok((stream, _)) => {
                    stream.set_nodelay(true).ok();
                    if connections.send(Ok(stream)).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(accepted)
}
