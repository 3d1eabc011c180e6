//! The FFN daemon's loop: the next batch, this shard's part of its layer, the replies.

mod compute;
mod gpu;
mod host;

use crate::options::Notice;
use crate::wire::Wire;
use crate::{DaemonError, Step};
use compute::Compute;
use gpu::GpuCompute;
use host::HostCompute;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use stepmesh_mesh::{Batch, FfnMesh, MeshEvent, Policy};
use stepmesh_model::FfnStage;
use stepmesh_model::cuda::CudaFfn;
use stepmesh_proto::control::to_member;

/// An FFN stage, and where hidden states pass between it and its slots.
pub enum FfnSide {
    /// Through host slices.
    Host(Box<dyn FfnStage>),
    /// The GPU computes in the slots themselves: the mesh's device is [`beside`](stepmesh_transport::cuda::beside) it, and partial
    /// sums travel as its activations are.
    Gpu(Box<CudaFfn>),
}

/// An FFN instance at work.
pub struct FfnExecutor {
    mesh: FfnMesh,
    compute: Box<dyn Compute>,
    policy: Policy,
    notices: VecDeque<Notice>,
    draining: bool,
}

impl FfnExecutor {
    /// Joins a mesh and a shard of the model.
    ///
    /// # Errors
    /// The GPU refuses.
    pub fn new(mesh: FfnMesh, side: FfnSide, wire: Wire, policy: Policy) -> Result<Self, DaemonError> {
        let compute: Box<dyn Compute> = match side {
            FfnSide::Host(stage) => Box::new(HostCompute::new(stage, wire)),
            FfnSide::Gpu(stage) => Box::new(GpuCompute::new(*stage, wire)?),
        };
        Ok(Self { mesh, compute, policy, notices: VecDeque::new(), draining: false })
    }

    /// The mesh.
    pub fn mesh(&mut self) -> &mut FfnMesh {
        &mut self.mesh
    }

    /// The next thing that whoever started the daemon should know.
    pub fn next_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// The scheduler asked this daemon to go.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Makes progress: at most one batch.
    pub fn poll(&mut self) -> Result<Step, DaemonError> {
        self.mesh.poll()?;
        self.take_events()?;
        let mut worked = self.respond()?;
        if self.compute.has_room()
            && let Some(batch) = self.mesh.try_next_batch(self.policy)
        {
            self.process(batch)?;
            worked = true;
        }
        Ok(if worked || self.compute.is_busy() { Step::Worked } else { Step::Idle })
    }

    /// Makes progress, and sleeps until something arrives or `timeout` has passed if there is nothing to do.
    pub fn run_once(&mut self, timeout: Duration) -> Result<(), DaemonError> {
        if self.poll()? == Step::Worked {
            return Ok(());
        }
        let deadline: Instant = self.mesh.clock().after(timeout);
        if let Some(batch) = self.mesh.next_batch(self.policy, deadline - self.mesh.clock().now())? {
            self.process(batch)?;
        }
        self.take_events()
    }

    fn take_events(&mut self) -> Result<(), DaemonError> {
        while let Some(event) = self.mesh.next_event() {
            match event {
                MeshEvent::Epoch { epoch, complete: true } => self.notices.push_back(Notice::Ready { epoch }),
                MeshEvent::PeerLost { peer, reason } => {
                    self.notices.push_back(Notice::PeerLost(format!("{peer}: {reason}")));
                }
                MeshEvent::LinkDown { peer, reason } => {
                    self.notices.push_back(Notice::LinkDown(format!("{peer}: {reason}")));
                }
                MeshEvent::SchedulerLost(reason) => {
                    return Err(stepmesh_mesh::MeshError::SchedulerLost(reason).into());
                }
                MeshEvent::Control(to_member::Body::Drain(_)) => {
                    self.draining = true;
                    self.notices.push_back(Notice::Draining);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn process(&mut self, batch: Batch) -> Result<(), DaemonError> {
        self.compute.begin(batch)?;
        self.respond()?;
        Ok(())
    }

    /// Sends the replies that are ready; whether there were any.
    fn respond(&mut self) -> Result<bool, DaemonError> {
        let mut any = false;
        while let Some(batch) = self.compute.end()? {
            self.mesh.respond(batch)?;
            any = true;
        }
        Ok(any)
    }
}
