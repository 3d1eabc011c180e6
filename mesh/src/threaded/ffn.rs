//! The FFN side with a progress thread: the verbs of [`FfnMesh`], from the application's thread.

use super::engine::{Driven, Engine, ProgressOptions};
use crate::member::Member;
use crate::{Batch, FfnMesh, MeshError, MeshEvent, PartArray, Policy};
use std::time::{Duration, Instant};
use stepmesh_proto::control::from_member;
use stepmesh_transport::Waker;

/// An FFN instance whose transfers go on while the application computes. One thread at a time uses it; dropping it stops and
/// joins the progress thread.
pub struct FfnEngine {
    engine: Engine<FfnMesh>,
}

impl Driven for FfnMesh {
    fn member(&mut self) -> &mut Member {
        &mut self.member
    }

    fn poll(&mut self) -> Result<(), MeshError> {
        self.poll()
    }

    fn arrived(&self) -> u64 {
        self.arrived()
    }
}

impl FfnEngine {
    /// Gives a member a progress thread. It may have joined already, or not.
    pub fn start(mesh: FfnMesh, options: ProgressOptions) -> Result<Self, MeshError> {
        Ok(Self { engine: Engine::start(mesh, options)? })
    }

    /// This instance's rank, once admitted.
    pub fn rank(&self) -> Option<u32> {
        self.engine.peek(|mesh| mesh.rank()).flatten()
    }

    /// FFN instances of the deployment, once admitted: how many shards there are.
    pub fn ffn(&self) -> usize {
        self.engine.peek(|mesh| mesh.ffn()).unwrap_or_default()
    }

    /// Attention instances of the deployment, once admitted.
    pub fn attention(&self) -> usize {
        self.engine.peek(|mesh| mesh.attention()).unwrap_or_default()
    }

    /// All ranks are held and all links are up.
    pub fn is_complete(&self) -> bool {
        self.engine.peek(|mesh| mesh.is_complete()).unwrap_or_default()
    }

    /// The next thing that happened besides requests.
    pub fn next_event(&mut self) -> Option<MeshEvent> {
        self.engine.peek(FfnMesh::next_event).flatten()
    }

    /// Sends the application's message to the scheduler.
    pub fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        self.engine.with(|mesh| mesh.send_control(body))
    }

    /// Where a request part of a microbatch lies for all ranks, for kernels that take segments.
    pub fn part_array(&self, microbatch: u16, part: usize) -> Option<PartArray> {
        self.engine.peek(|mesh| mesh.part_array(microbatch, part)).flatten()
    }

    /// The next batch; none when `timeout` has passed, or earlier when an event wants to be looked at.
    pub fn next_batch(&mut self, policy: Policy, timeout: Duration) -> Result<Option<Batch>, MeshError> {
        let released = |mesh: &mut FfnMesh| match mesh.try_next_batch(policy) {
            None if !mesh.member.events.is_empty() => Some(None),
            batch => batch.map(Some),
        };
        Ok(self.engine.wait_for(timeout, released, |mesh| mesh.next_release(policy))?.flatten())
    }

    /// The oldest batch of the microbatches that `wanted` names that the policy allows now, as
    /// [`FfnMesh::try_next_batch_of`]. Makes progress.
    pub fn try_next_batch_of(
        &mut self,
        policy: Policy,
        wanted: impl Fn(u16) -> bool,
    ) -> Result<Option<Batch>, MeshError> {
        self.engine.wait_for(Duration::ZERO, |mesh| mesh.try_next_batch_of(policy, &wanted), |_| None)
    }

    /// When, with no further arrival, the policy will next release something.
    pub fn next_release(&self, policy: Policy) -> Option<Instant> {
        self.engine.peek(|mesh| mesh.next_release(policy)).flatten()
    }

    /// Requests that have arrived so far.
    pub fn arrived(&self) -> u64 {
        self.engine.peek(|mesh| mesh.arrived()).unwrap_or_default()
    }

    /// Sends every segment's reply. Segments whose attention instance is gone are dropped: its loss is an event.
    pub fn respond(&mut self, batch: Batch) -> Result<(), MeshError> {
        self.engine.with(|mesh| mesh.respond(batch))
    }

    /// Waits until the whole deployment is there.
    pub fn wait_complete(&mut self, timeout: Duration) -> Result<(), MeshError> {
        let completed = |mesh: &mut FfnMesh| mesh.member.completed();
        self.engine.wait_for(timeout, completed, |_| None)?.ok_or(MeshError::Timeout(timeout))?
    }

    /// Makes the current or next [`FfnEngine::sleep`] return, from another thread.
    pub fn waker(&self) -> Waker {
        self.engine.waker()
    }

    /// Sleeps until an event or a request may be there; may return early.
    pub fn sleep(&mut self, timeout: Duration) -> Result<(), MeshError> {
        self.engine.sleep(timeout)
    }
}
