//! The FFN side with a progress thread: the verbs of [`FfnMesh`], from the application's thread.

use super::ask::Ask;
use super::progress::{Driver, ProgressOptions, ProgressThread, Turn};
use super::standing::Standing;
use crate::layout::SlotLayout;
use crate::sync::ArrayQueue;
use crate::{Batch, FfnMesh, MeshError, MeshEvent, PartArray, Policy};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use stepmesh_proto::control::from_member;
use stepmesh_transport::{Clock, Waker};

/// Batches that may wait to be answered; more make `respond` wait for the progress thread.
const COMMANDS: usize = 1024;

/// An FFN instance whose transfers a thread of its own drives. One thread at a time uses it; dropping it stops and joins
/// the progress thread.
pub struct FfnEngine {
    thread: ProgressThread,
    shared: Arc<Shared>,
    layout: Arc<SlotLayout>,
}

struct Shared {
    commands: ArrayQueue<Command>,
    ask: Ask,
    batch: ArrayQueue<Batch>,
    payloads: OnceLock<PartArray>,
    standing: Standing,
}

enum Command {
    Respond(Batch),
    Control(Box<from_member::Body>),
}

impl FfnEngine {
    /// Hands a member over to a progress thread. It may have joined already, or not.
    pub fn start(mesh: FfnMesh, options: ProgressOptions) -> Result<Self, MeshError> {
        let layout = mesh.member.options.layout.clone();
        let shared = Arc::new(Shared {
            commands: ArrayQueue::new(COMMANDS),
            ask: Ask::new(),
            batch: ArrayQueue::new(1),
            payloads: OnceLock::new(),
            standing: Standing::new(),
        });
        let waker = mesh.waker();
        let driver = FfnDriver { mesh, shared: shared.clone(), in_vain: Ask::NOTHING };
        let thread = ProgressThread::spawn(options, waker, driver)?;
        Ok(Self { thread, shared, layout })
    }

    /// This instance's rank, once admitted.
    pub fn rank(&self) -> Option<u32> {
        self.shared.standing.rank()
    }

    /// FFN instances of the deployment, once admitted: how many shards there are.
    pub fn ffn(&self) -> usize {
        self.shared.standing.siblings()
    }

    /// Attention instances of the deployment, once admitted.
    pub fn attention(&self) -> usize {
        self.shared.standing.peers()
    }

    /// All ranks are held and all links are up.
    pub fn is_complete(&self) -> bool {
        self.shared.standing.is_complete()
    }

    /// The next thing that happened besides requests.
    pub fn next_event(&mut self) -> Option<MeshEvent> {
        self.shared.standing.next_event()
    }

    /// Sends the application's message to the scheduler; if its session is over an event says so.
    pub fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        self.thread.send(&self.shared.commands, Command::Control(Box::new(body)))
    }

    /// Where a request part of a microbatch lies for all ranks, for kernels that take segments.
    pub fn part_array(&self, microbatch: u16, part: usize) -> Option<PartArray> {
        self.shared.payloads.get()?.part(&self.layout, microbatch, part)
    }

    /// The next batch; none when `timeout` has passed, or earlier when an event wants to be looked at. A batch that is
    /// released just as the call expires is what the next call returns, whatever its policy.
    pub fn next_batch(&mut self, policy: Policy, timeout: Duration) -> Result<Option<Batch>, MeshError> {
        let shared = &self.shared;
        if let Some(batch) = shared.batch.pop() {
            return Ok(Some(batch));
        }
        self.thread.check()?;
        shared.ask.put(policy);
        self.thread.nudge();
        let arrived = || match shared.batch.pop() {
            None if shared.standing.has_events() => Some(None),
            batch => batch.map(Some),
        };
        let batch = self.thread.wait_for(Clock::system().after(timeout), arrived);
        shared.ask.withdraw();
        Ok(batch?.flatten().or_else(|| shared.batch.pop()))
    }

    /// Sends every segment's reply. Segments whose attention instance is gone are dropped: its loss is an event.
    pub fn respond(&mut self, batch: Batch) -> Result<(), MeshError> {
        self.thread.send(&self.shared.commands, Command::Respond(batch))
    }

    /// Waits until the whole deployment is there.
    pub fn wait_complete(&mut self, timeout: Duration) -> Result<(), MeshError> {
        let completed = || self.shared.standing.completed();
        self.thread.wait_for(Clock::system().after(timeout), completed)?.ok_or(MeshError::Timeout(timeout))?
    }

    /// Makes the current or next [`FfnEngine::sleep`] return, from another thread.
    pub fn waker(&self) -> Waker {
        self.thread.waker()
    }

    /// Sleeps until an event may be there; may return early.
    pub fn sleep(&mut self, timeout: Duration) {
        self.thread.park(timeout);
    }
}

struct FfnDriver {
    mesh: FfnMesh,
    shared: Arc<Shared>,
    /// What was asked for in vain at the last turn; only an arrival or time can change that.
    in_vain: u64,
}

impl FfnDriver {
    /// What is asked for, unless an answer waits to be fetched.
    fn asked(&self) -> Option<(Policy, u64)> {
        self.shared.ask.get().filter(|_| self.shared.batch.is_empty())
    }
}

impl Driver for FfnDriver {
    fn turn(&mut self) -> Result<Turn, MeshError> {
        let mut turn = Turn::Idle;
        while let Some(command) = self.shared.commands.pop() {
            match command {
                Command::Respond(batch) => self.mesh.respond(batch)?,
                // The session's end is an event.
                Command::Control(body) => drop(self.mesh.send_control(*body)),
            }
            turn = Turn::Worked;
        }
        self.mesh.poll()?;
        if self.shared.payloads.get().is_none()
            && let Some(payloads) = self.mesh.payloads()
        {
            let _ = self.shared.payloads.set(payloads);
        }
        self.in_vain = Ask::NOTHING;
        if let Some((policy, word)) = self.asked() {
            if let Some(batch) = self.mesh.try_next_batch(policy) {
                self.shared.ask.answer(word);
                let _ = self.shared.batch.push(batch);
                turn = Turn::Produced;
            } else {
                self.in_vain = word;
            }
        }
        Ok(turn.max(self.shared.standing.publish(&mut self.mesh.member)))
    }

    fn has_commands(&self) -> bool {
        !self.shared.commands.is_empty() || self.asked().is_some_and(|(_, word)| word != self.in_vain)
    }

    fn sleep(&mut self) -> Result<(), MeshError> {
        let latest = self.mesh.clock().now() + Duration::from_secs(1);
        let release = self.asked().and_then(|(policy, _)| self.mesh.next_release(policy));
        self.mesh.sleep(release.map_or(latest, |release| release.min(latest)))
    }
}
