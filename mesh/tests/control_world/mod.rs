//! A scheduler on loopback and members that wait for what they are told.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{ConnectOptions, Control, ControlEvent, GrpcControl};
use stepmesh_mesh::scheduler::{Background, SchedulerOptions, ServeOptions, spawn};
use stepmesh_proto::WIRE_VERSION;
use stepmesh_proto::control::scheduler_server::{Scheduler, SchedulerServer};
use stepmesh_proto::control::{
    CONTROL_VERSION, FromMember, GenerateEvent, GenerateRequest, Hello, Role, StatsReply, StatsRequest, StatusReply,
    StatusRequest, ToMember, from_member::Body as Said, to_member::Body,
};
use tonic::{Request, Response, Status, Streaming};

/// Until when a test waits for something that must happen.
pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

pub(crate) fn options(attention: u32, ffn: u32) -> ServeOptions {
    let drain = Duration::from_millis(200);
    ServeOptions { drain, ..ServeOptions::new(SchedulerOptions::new(attention, ffn)) }
}

pub(crate) fn serve(attention: u32, ffn: u32) -> Background {
    spawn(options(attention, ffn)).unwrap()
}

pub(crate) fn session(body: Said) -> FromMember {
    FromMember { body: Some(body) }
}

pub(crate) fn hello(role: Role) -> Hello {
    Hello {
        control_version: CONTROL_VERSION,
        wire_version: WIRE_VERSION.into(),
        role: role.into(),
        rank: None,
        name: "host".to_owned(),
        transport: "mem".to_owned(),
        lanes: 2,
        layout: "3 microbatches of 8 rows".to_owned(),
        workload: "tiny bf16".to_owned(),
        pid: 42,
    }
}

/// A member that sleeps until it is woken.
pub(crate) struct Member {
    pub(crate) control: GrpcControl,
    woken: Receiver<()>,
}

impl Member {
    pub(crate) fn connect(url: &str) -> Self {
        let (wake, woken) = channel();
        let control =
            GrpcControl::connect(ConnectOptions::new(url), Box::new(move || wake.send(()).unwrap_or_default()))
                .unwrap();
        Self { control, woken }
    }

    pub(crate) fn join(url: &str, role: Role) -> Self {
        let mut member = Self::connect(url);
        member.say(Said::Hello(hello(role)));
        member.expect(|body| matches!(body, Body::Welcome(_)).then_some(()));
        member
    }

    pub(crate) fn say(&mut self, body: Said) {
        self.control.send(session(body)).unwrap();
    }

    /// The next message that is already there.
    pub(crate) fn next(&mut self) -> Option<Body> {
        match self.control.poll()? {
            ControlEvent::Message(message) => message.body,
            ControlEvent::Lost(reason) => panic!("the session is over: {reason}"),
        }
    }

    fn event(&mut self) -> ControlEvent {
        let deadline = soon();
        loop {
            if let Some(event) = self.control.poll() {
                return event;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.woken.recv_timeout(left).expect("nothing arrived, or nobody was woken");
        }
    }

    /// Waits for a message of that kind; others are of no interest.
    pub(crate) fn expect<T>(&mut self, mut kind: impl FnMut(Body) -> Option<T>) -> T {
        loop {
            match self.event() {
                ControlEvent::Message(message) => {
                    if let Some(found) = kind(message.body.unwrap()) {
                        return found;
                    }
                }
                ControlEvent::Lost(reason) => panic!("the session is over: {reason}"),
            }
        }
    }

    /// Whether no message of that kind is there.
    pub(crate) fn quiet<T>(&mut self, mut kind: impl FnMut(Body) -> Option<T>) -> bool {
        std::iter::from_fn(|| self.next()).all(|body| kind(body).is_none())
    }

    /// Waits for the session's end, and says why.
    pub(crate) fn lost(&mut self) -> String {
        loop {
            if let ControlEvent::Lost(reason) = self.event() {
                return reason;
            }
        }
    }
}

/// This test binary again, as an FFN member that does nothing.
pub(crate) fn spawn_member_process(url: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "member_process", "--ignored"])
        .env("CONTROL_TEST_SCHEDULER", url)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

struct OtherRelease;

type Nothing<T> = tokio_stream::Empty<Result<T, Status>>;

#[tonic::async_trait]
impl Scheduler for OtherRelease {
    type JoinStream = Nothing<ToMember>;
    type GenerateStream = Nothing<GenerateEvent>;

    async fn join(&self, _: Request<Streaming<FromMember>>) -> Result<Response<Self::JoinStream>, Status> {
        Ok(Response::new(tokio_stream::empty()))
    }

    async fn generate(&self, _: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        Ok(Response::new(tokio_stream::empty()))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        Ok(Response::new(StatusReply { control_version: 77, wire_version: 1, ..Default::default() }))
    }

    async fn stats(&self, _: Request<StatsRequest>) -> Result<Response<StatsReply>, Status> {
        Ok(Response::new(StatsReply::default()))
    }
}

/// A scheduler that speaks control version 77, until the test ends.
pub(crate) fn serve_other_release() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    listener.set_nonblocking(true).unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let service = SchedulerServer::new(OtherRelease);
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
    });
    url
}
