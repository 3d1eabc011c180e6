//! Joining in one call: a device, an endpoint, a session with the scheduler, and the wait until it has admitted us.

use std::time::{Duration, Instant};
use stepmesh_mesh::control::{ConnectOptions, Control, ControlError, GrpcControl};
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, MeshError};
use stepmesh_transport::{Clock, DeviceOptions, Provider, TransportError, open};
use thiserror::Error;

/// The longest wait between two looks at whether the caller has been interrupted.
const LOOK: Duration = Duration::from_millis(100);

/// All that joining needs.
#[derive(Clone, Debug)]
pub struct Joining {
    /// The member.
    pub member: MemberOptions,
    /// The scheduler; its time-out is also how long the member waits to be admitted.
    pub connect: ConnectOptions,
    /// How tensors travel.
    pub provider: Provider,
    /// The provider's own options.
    pub device: DeviceOptions,
}

/// Why a member has not joined.
#[derive(Debug, Error)]
pub enum JoinError {
    /// The provider refused.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The scheduler could not be spoken with.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The mesh refused, or the scheduler did.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// The caller's own question said so.
    #[error("interrupted")]
    Interrupted,
}

impl Joining {
    /// Joins as an attention instance, and returns once the scheduler has given it a rank. `interrupted` is asked every
    /// tenth of a second.
    pub fn attention(self, interrupted: impl FnMut() -> bool) -> Result<AttentionMesh, JoinError> {
        let patience = self.connect.timeout;
        let device = open(self.provider, &self.device)?;
        let endpoint = device.endpoint()?;
        let waker = endpoint.waker();
        let control: Box<dyn Control> = Box::new(GrpcControl::connect(self.connect, Box::new(move || waker.wake()))?);
        let mut mesh = AttentionMesh::with_endpoint(self.member, device, endpoint, control, Clock::system())?;
        admitted(patience, interrupted, |until| {
            mesh.poll()?;
            let admitted = mesh.rank().is_some();
            if !admitted {
                mesh.sleep(until)?;
            }
            Ok(admitted)
        })?;
        Ok(mesh)
    }

    /// Joins as an FFN instance; otherwise as [`Joining::attention`].
    pub fn ffn(self, interrupted: impl FnMut() -> bool) -> Result<FfnMesh, JoinError> {
        let patience = self.connect.timeout;
        let device = open(self.provider, &self.device)?;
        let endpoint = device.endpoint()?;
        let waker = endpoint.waker();
        let control: Box<dyn Control> = Box::new(GrpcControl::connect(self.connect, Box::new(move || waker.wake()))?);
        let mut mesh = FfnMesh::with_endpoint(self.member, device, endpoint, control, Clock::system())?;
        admitted(patience, interrupted, |until| {
            mesh.poll()?;
            let admitted = mesh.rank().is_some();
            if !admitted {
                mesh.sleep(until)?;
            }
            Ok(admitted)
        })?;
        Ok(mesh)
    }
}

/// Calls `poll`, which sleeps until the time given and says whether the member has a rank, until it has one.
fn admitted(
    patience: Duration,
    mut interrupted: impl FnMut() -> bool,
    mut poll: impl FnMut(Instant) -> Result<bool, MeshError>,
) -> Result<(), JoinError> {
    let deadline = Clock::system().after(patience);
    while !poll(deadline.min(Instant::now() + LOOK))? {
        if interrupted() {
            return Err(JoinError::Interrupted);
        }
        if Instant::now() >= deadline {
            return Err(MeshError::Timeout(patience).into());
        }
    }
    Ok(())
}
