//! The member's and the client's side of the control plane.
//!
//! A member drives a [`Control`]: it sends and polls without ever blocking, so that the thread which moves tensors can
//! also keep the deployment's books.

use stepmesh_proto::control::{FromMember, ToMember};

mod client;
mod connect;
mod error;
mod grpc;
mod local;
mod token;

pub use client::{BlockingClient, BlockingGeneration, Client, Generation};
pub use connect::ConnectOptions;
pub use error::ControlError;
pub use grpc::GrpcControl;
pub use local::{LocalControl, LocalScheduler};
pub use token::{Token, TokenError};

/// What the control plane tells a member.
#[derive(Clone, Debug, PartialEq)]
pub enum ControlEvent {
    /// The scheduler says something.
    Message(ToMember),
    /// The session is over, and why. Nothing follows.
    Lost(String),
}

/// A member's session with the scheduler, over gRPC, within the process or in a simulation. The first message is the member's `Hello`;
/// heartbeats are the implementation's business.
pub trait Control: Send {
    /// Queues a message; never blocks. It fails when the session is over or the queue is full.
    fn send(&mut self, message: FromMember) -> Result<(), ControlError>;

    /// The next event, if there is one; never blocks. After [`ControlEvent::Lost`] there is none.
    fn poll(&mut self) -> Option<ControlEvent>;
}
