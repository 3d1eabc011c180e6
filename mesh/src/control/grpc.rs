//! A member's session over gRPC: one thread that keeps it alive, two queues to the member.

use super::connect::{dial, refusal, url, words};
use super::{ConnectOptions, Control, ControlError, ControlEvent};
use std::fmt;
use std::thread::JoinHandle;
use std::time::Duration;
use stepmesh_proto::control::{FromMember, Heartbeat, Leave, ToMember, from_member, to_member};
use stepmesh_transport::into_background;
use tokio::sync::mpsc::error::{TryRecvError, TrySendError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// Messages that may wait to be sent.
const OUTGOING: usize = 16_384;
/// Events that may wait for the member; when there are more, the scheduler has to wait.
const EVENTS: usize = 16_384;
/// The longest that saying good-bye may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// Called when an event has arrived.
type Wake = Box<dyn Fn() + Send + Sync>;

/// A member's session with the scheduler. Dropping it says good-bye.
pub struct GrpcControl {
    outgoing: Option<mpsc::Sender<FromMember>>,
    events: mpsc::Receiver<ControlEvent>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    greeted: bool,
    over: Option<String>,
}

impl fmt::Debug for GrpcControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { greeted, over, .. } = self;
        f.debug_struct("GrpcControl").field("greeted", greeted).field("over", over).finish_non_exhaustive()
    }
}

impl GrpcControl {
    /// Opens a session. Waits for the scheduler for as long as the options say. `wake` is called, on the session's
    /// thread, whenever [`poll`](Control::poll) has something new.
    pub fn connect(options: ConnectOptions, wake: Wake) -> Result<Self, ControlError> {
        let (outgoing, to_send) = mpsc::channel(OUTGOING);
        let (deliver, events) = mpsc::channel(EVENTS);
        let (stop, stopped) = oneshot::channel();
        let (opened, is_open) = std::sync::mpsc::sync_channel(1);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let heartbeats = outgoing.clone();
        let session = move || {
            into_background();
            runtime.block_on(async {
                match open(&options, to_send).await {
                    Ok(said) => {
                        opened.send(Ok(())).ok();
                        Session { said, heartbeats, deliver, wake }.run(stopped).await;
                    }
                    Err(error) => drop(opened.send(Err(error))),
                }
            });
            // A name look-up that hangs must not hold up the member.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("stepmesh-control".to_owned()).spawn(session)?;
        match is_open.recv() {
            Ok(opened) => opened?,
            Err(_) => return Err(ControlError::Lost("the session's thread ended".to_owned())),
        }
        Ok(Self {
            outgoing: Some(outgoing),
            events,
            stop: Some(stop),
            thread: Some(thread),
            greeted: false,
            over: None,
        })
    }
}

impl Control for GrpcControl {
    fn send(&mut self, message: FromMember) -> Result<(), ControlError> {
        if let Some(reason) = &self.over {
            return Err(ControlError::Lost(reason.clone()));
        }
        self.greeted |= matches!(message.body, Some(from_member::Body::Hello(_)));
        let over = || ControlError::Lost("the session is over".to_owned());
        self.outgoing.as_ref().ok_or_else(over)?.try_send(message).map_err(|error| match error {
            TrySendError::Full(_) => ControlError::Full(OUTGOING),
            TrySendError::Closed(_) => over(),
        })
    }

    fn poll(&mut self) -> Option<ControlEvent> {
        let event = match self.events.try_recv() {
            Ok(event) => event,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) if self.over.is_some() => return None,
            Err(TryRecvError::Disconnected) => ControlEvent::Lost("the session's thread ended".to_owned()),
        };
        if let ControlEvent::Lost(reason) = &event {
            self.over = Some(reason.clone());
        }
        Some(event)
    }
}

impl Drop for GrpcControl {
    fn drop(&mut self) {
        if let Some(outgoing) = self.outgoing.take()
            && self.greeted
            && self.over.is_none()
        {
            let leave = Leave { reason: "it closed its session".to_owned() };
            outgoing.try_send(FromMember { body: Some(from_member::Body::Leave(leave)) }).ok();
        }
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

async fn open(
    options: &ConnectOptions,
    to_send: mpsc::Receiver<FromMember>,
) -> Result<Streaming<ToMember>, ControlError> {
    let mut stub = dial(options).await?;
    let joined = timeout(options.timeout.max(FAREWELL), stub.join(ReceiverStream::new(to_send))).await;
    match joined {
        Ok(Ok(said)) => Ok(said.into_inner()),
        Ok(Err(status)) => Err(refusal(&url(&options.scheduler), &status)),
        Err(_) => Err(ControlError::Lost("it did not open a session in time".to_owned())),
    }
}

/// The session's own half, on its thread.
struct Session {
    said: Streaming<ToMember>,
    heartbeats: mpsc::Sender<FromMember>,
    deliver: mpsc::Sender<ControlEvent>,
    wake: Wake,
}

impl Session {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let over = tokio::select! {
            reason = self.converse() => Some(reason),
            _ = &mut stopped => None,
        };
        let Some(reason) = over else { return self.farewell().await };
        tokio::select! {
            delivered = self.deliver.send(ControlEvent::Lost(reason)) => if delivered.is_ok() { (self.wake)() },
            _ = stopped => {}
        }
    }

    /// Delivers what the scheduler says, and sends heartbeats, until the session is over; why it is. Other threads'
    /// messages go out by themselves.
    async fn converse(&mut self) -> String {
        let Self { said, heartbeats, deliver, wake } = self;
        let mut beat: Option<Interval> = None;
        let mut refused = None;
        loop {
            // A member that does not poll still lives: its events wait, its heartbeats go on.
            let next = async {
                let room = deliver.reserve().await;
                (room, said.message().await)
            };
            let (room, message) = tokio::select! {
                (room, said) = next => match said {
                    Ok(Some(message)) => (room, message),
                    Ok(None) => return refused.unwrap_or_else(|| "the scheduler ended the session".to_owned()),
                    Err(status) => return refused.unwrap_or_else(|| words(&status)),
                },
                () = due(&mut beat) => {
                    // When the queue is full something else is on its way, which counts as well.
                    heartbeats.try_send(FromMember { body: Some(from_member::Body::Heartbeat(Heartbeat {})) }).ok();
                    continue;
                }
            };
            match &message.body {
                Some(to_member::Body::Welcome(welcome)) => {
                    let mut every = interval(Duration::from_millis(u64::from(welcome.heartbeat_ms.max(1))));
                    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    beat = Some(every);
                }
                Some(to_member::Body::Refused(refusal)) => refused = Some(refusal.reason.clone()),
                _ => {}
            }
            if let Ok(room) = room {
                room.send(ControlEvent::Message(message));
                wake();
            }
        }
    }

    /// What is queued, the good-bye at its end, is sent; the scheduler answers by ending the session.
    async fn farewell(self) {
        let Self { mut said, heartbeats, .. } = self;
        drop(heartbeats);
        let ended = async { while let Ok(Some(_)) = said.message().await {} };
        timeout(FAREWELL, ended).await.ok();
    }
}

async fn due(beat: &mut Option<Interval>) {
    match beat {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}
