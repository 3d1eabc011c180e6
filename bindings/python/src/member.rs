//! Both sides of the mesh, each driven by its caller or by a thread of its own, under one set of verbs.

use crate::error::Failure;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};
use stepmesh_embed::{Driven, answer};
use stepmesh_mesh::threaded::{AttentionEngine, FfnEngine, OwnedReply, ProgressOptions};
use stepmesh_mesh::{
    AttentionMesh, Batch, FfnMesh, MeshError, MeshEvent, PartArray, Policy, Replies, Request, SendBuffer, Ticket,
    TicketStatus, Trace,
};
use stepmesh_proto::Part;
use stepmesh_proto::control::{BarrierEnter, BarrierGroup, from_member, to_member};
use stepmesh_transport::{Region, Waker};

/// Events that are kept for the caller.
const KEPT: usize = 1024;

/// What the scheduler and the links have to say.
#[derive(Default)]
pub(crate) struct News {
    events: VecDeque<MeshEvent>,
    released: HashMap<(String, i32), String>,
    scheduler_lost: Option<String>,
    barriers: HashMap<(String, i32), u64>,
}

impl News {
    /// Takes an event in; the answer that it wants.
    fn take_in(&mut self, event: MeshEvent) -> Option<from_member::Body> {
        match &event {
            MeshEvent::Control(to_member::Body::BarrierReleased(released)) => {
                self.released.insert((released.name.clone(), released.group), released.broken.clone());
                return None;
            }
            MeshEvent::Control(body) => {
                if let Some(answer) = answer(body) {
                    return Some(answer);
                }
            }
            MeshEvent::SchedulerLost(reason) => self.scheduler_lost = Some(reason.clone()),
            _ => {}
        }
        if self.events.len() == KEPT {
            self.events.pop_front();
        }
        self.events.push_back(event);
        None
    }

    /// The oldest event.
    pub(crate) fn next(&mut self) -> Option<MeshEvent> {
        self.events.pop_front()
    }

    /// A name that all members make alike when they enter barriers in the same order, and the message.
    pub(crate) fn enter(&mut self, name: &str, group: BarrierGroup) -> ((String, i32), from_member::Body) {
        let group = group as i32;
        let count = self.barriers.entry((name.to_owned(), group)).or_default();
        *count += 1;
        let name = format!("{name}#{count}");
        let enter = BarrierEnter { name: name.clone(), group };
        ((name, group), from_member::Body::BarrierEnter(enter))
    }

    /// How a barrier ended, if it has.
    pub(crate) fn released(&mut self, barrier: &(String, i32)) -> Option<Result<(), Failure>> {
        match self.released.remove(barrier) {
            Some(broken) if broken.is_empty() => Some(Ok(())),
            Some(broken) => Some(Err(Failure::Lost(format!("the barrier cannot be met: {broken}")))),
            None => self.scheduler_lost().map(|error| Err(error.into())),
        }
    }

    pub(crate) fn scheduler_lost(&self) -> Option<MeshError> {
        self.scheduler_lost.clone().map(MeshError::SchedulerLost)
    }
}

#[allow(clippy::large_enum_variant, reason = "one a mesh, never moved")]
enum AttentionKind {
    Driven(AttentionMesh),
    Threaded(AttentionEngine),
}

/// An attention instance.
pub(crate) struct Attention {
    kind: AttentionKind,
    /// This instance's rank, and the FFN instances of the deployment.
    pub(crate) rank: u32,
    pub(crate) ffn: usize,
    pub(crate) news: News,
    /// Replies of an engine's, which hold their microbatch until they are given back.
    held: Vec<Option<OwnedReply>>,
    outstanding: Vec<Option<Ticket>>,
    /// The last group of each microbatch of those that were counted here.
    groups: Vec<u32>,
}

/// Where bytes lie.
pub(crate) type Place = (Region, Range<usize>);

/// One FFN instance's reply, in the slots where it landed.
pub(crate) struct Landed {
    pub(crate) parts: Vec<(Part, Option<Place>)>,
    pub(crate) app: [u8; 16],
    pub(crate) trace: Trace,
}

fn counted(groups: &mut [u32], microbatch: u16) -> u32 {
    groups.get_mut(usize::from(microbatch)).map_or(0, |group| {
        *group = if *group >= u32::MAX - 1 { 0 } else { *group + 1 };
        *group
    })
}

fn threaded() -> Failure {
    Failure::Invalid(
        "progress: \"thread\": slots' places and captured steps are for members that their caller drives".into(),
    )
}

fn landed(replies: &Replies) -> Vec<Landed> {
    let of = |rank: usize| {
        let parts = replies.parts(rank).iter().enumerate();
        let parts = parts.map(|(index, part)| (*part, replies.part_place(rank, index))).collect();
        Landed { parts, app: replies.app(rank), trace: replies.trace(rank) }
    };
    (0..replies.ranks()).map(of).collect()
}

impl Attention {
    /// A member that has been admitted; with a progress thread if there are options for it.
    pub(crate) fn new(
        mesh: AttentionMesh,
        microbatches: u16,
        progress: Option<ProgressOptions>,
    ) -> Result<(Self, Waker), MeshError> {
        let (rank, ffn) = (mesh.rank().unwrap_or_default(), mesh.ffn());
        let (kind, waker) = match progress {
            None => {
                let waker = mesh.waker();
                (AttentionKind::Driven(mesh), waker)
            }
            Some(options) => {
                let engine = AttentionEngine::start(mesh, options)?;
                let waker = engine.waker();
                (AttentionKind::Threaded(engine), waker)
            }
        };
        let count = usize::from(microbatches);
        let held = (0..count).map(|_| None).collect();
        let (outstanding, groups) = (vec![None; count], vec![0; count]);
        Ok((Self { kind, rank, ffn, news: News::default(), held, outstanding, groups }, waker))
    }

    /// One group more than the last that was counted, for a microbatch that there is.
    pub(crate) fn next_group(&mut self, microbatch: u16) -> u32 {
        counted(&mut self.groups, microbatch)
    }

    /// The member itself, for one who calls only while nobody else does.
    pub(crate) fn driven(&mut self) -> Result<&mut AttentionMesh, Failure> {
        match &mut self.kind {
            AttentionKind::Driven(mesh) => Ok(mesh),
            AttentionKind::Threaded(_) => Err(threaded()),
        }
    }

    /// Everybody is there, and linked.
    pub(crate) fn is_complete(&self) -> bool {
        match &self.kind {
            AttentionKind::Driven(mesh) => mesh.is_complete() && mesh.is_linked(),
            AttentionKind::Threaded(engine) => engine.is_complete() && engine.is_linked(),
        }
    }

    pub(crate) fn acquire(&mut self, microbatch: u16) -> Result<SendBuffer, MeshError> {
        if let Some(held) = self.held.get_mut(usize::from(microbatch)) {
            *held = None;
        }
        match &mut self.kind {
            AttentionKind::Driven(mesh) => mesh.acquire(microbatch),
            AttentionKind::Threaded(engine) => engine.acquire(microbatch),
        }
    }

    pub(crate) fn push_pull(&mut self, buffer: SendBuffer, request: Request<'_>) -> Result<Ticket, MeshError> {
        let ticket = match &mut self.kind {
            AttentionKind::Driven(mesh) => mesh.push_pull(buffer, request),
            AttentionKind::Threaded(engine) => engine.push_pull(buffer, request),
        }?;
        self.outstanding[usize::from(ticket.microbatch())] = Some(ticket);
        Ok(ticket)
    }

    /// Whether taking would not have to wait.
    pub(crate) fn is_over(&mut self, ticket: Ticket) -> bool {
        match &mut self.kind {
            AttentionKind::Driven(mesh) => mesh.status(ticket) != TicketStatus::Pending,
            AttentionKind::Threaded(engine) => engine.is_over(ticket),
        }
    }

    /// Consumes a ticket that is over.
    pub(crate) fn take(&mut self, ticket: Ticket) -> Result<Vec<Landed>, MeshError> {
        let index = usize::from(ticket.microbatch());
        if self.outstanding.get(index) == Some(&Some(ticket)) {
            self.outstanding[index] = None;
        }
        match &mut self.kind {
            AttentionKind::Driven(mesh) => mesh.take(ticket).map(|reply| landed(&reply)),
            AttentionKind::Threaded(engine) => {
                let reply = engine.wait(ticket, Duration::ZERO)?;
                let replies = landed(&reply);
                self.held[index] = Some(reply);
                Ok(replies)
            }
        }
    }

    pub(crate) fn cancel(&mut self, ticket: Ticket) -> Result<(), MeshError> {
        let index = usize::from(ticket.microbatch());
        if self.outstanding.get(index) == Some(&Some(ticket)) {
            self.outstanding[index] = None;
        }
        match &mut self.kind {
            AttentionKind::Driven(mesh) => {
                mesh.cancel(ticket);
                let _ = mesh.take(ticket);
                Ok(())
            }
            AttentionKind::Threaded(engine) => engine.cancel(ticket),
        }
    }

    pub(crate) fn leave(&mut self, microbatch: u16) -> Result<(), MeshError> {
        if let Some(held) = self.held.get_mut(usize::from(microbatch)) {
            *held = None;
        }
        match &mut self.kind {
            AttentionKind::Driven(mesh) => mesh.leave(microbatch),
            AttentionKind::Threaded(engine) => engine.leave(microbatch),
        }
    }

    pub(crate) fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        match &mut self.kind {
            AttentionKind::Driven(mesh) => mesh.send_control(body),
            AttentionKind::Threaded(engine) => engine.send_control(body),
        }
    }

    fn next_event(&mut self) -> Option<MeshEvent> {
        match &mut self.kind {
            AttentionKind::Driven(mesh) => mesh.next_event(),
            AttentionKind::Threaded(engine) => engine.next_event(),
        }
    }
}

impl Driven for Attention {
    fn poll(&mut self) -> Result<(), MeshError> {
        if let AttentionKind::Driven(mesh) = &mut self.kind {
            mesh.poll()?;
        }
        while let Some(event) = self.next_event() {
            if let Some(answer) = self.news.take_in(event) {
                // A scheduler that is lost is an event of its own.
                let _ = self.send_control(answer);
            }
        }
        Ok(())
    }

    fn settled(&mut self) -> u64 {
        let events = (self.news.events.len() + self.news.released.len()) as u64;
        let tickets: Vec<_> = self.outstanding.iter().flatten().copied().collect();
        tickets.into_iter().fold(events, |sum, ticket| {
            let over = u64::from(self.is_over(ticket)) << (ticket.microbatch() % 48);
            sum.wrapping_mul(31).wrapping_add(over)
        })
    }

    fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
        match &mut self.kind {
            AttentionKind::Driven(mesh) => mesh.sleep(deadline),
            AttentionKind::Threaded(engine) => engine.sleep(deadline.saturating_duration_since(Instant::now())),
        }
    }
}

#[allow(clippy::large_enum_variant, reason = "one a mesh, never moved")]
enum FfnKind {
    Driven(FfnMesh),
    Threaded(FfnEngine),
}

/// An FFN instance.
pub(crate) struct Ffn {
    kind: FfnKind,
    /// This instance's rank, and the instances of both sides of the deployment.
    pub(crate) rank: u32,
    pub(crate) attention: usize,
    pub(crate) ffn: usize,
    pub(crate) news: News,
    /// When time alone will release a batch that was asked for.
    due: Option<Instant>,
}

impl Ffn {
    /// A member that has been admitted; with a progress thread if there are options for it.
    pub(crate) fn new(mesh: FfnMesh, progress: Option<ProgressOptions>) -> Result<(Self, Waker), MeshError> {
        let (rank, attention, ffn) = (mesh.rank().unwrap_or_default(), mesh.attention(), mesh.ffn());
        let (kind, waker) = match progress {
            None => {
                let waker = mesh.waker();
                (FfnKind::Driven(mesh), waker)
            }
            Some(options) => {
                let engine = FfnEngine::start(mesh, options)?;
                let waker = engine.waker();
                (FfnKind::Threaded(engine), waker)
            }
        };
        Ok((Self { kind, rank, attention, ffn, news: News::default(), due: None }, waker))
    }

    pub(crate) fn is_complete(&self) -> bool {
        match &self.kind {
            FfnKind::Driven(mesh) => mesh.is_complete(),
            FfnKind::Threaded(engine) => engine.is_complete(),
        }
    }

    /// The member itself, for one who calls only while nobody else does.
    pub(crate) fn driven(&mut self) -> Result<&mut FfnMesh, Failure> {
        match &mut self.kind {
            FfnKind::Driven(mesh) => Ok(mesh),
            FfnKind::Threaded(_) => Err(threaded()),
        }
    }

    pub(crate) fn part_array(&self, microbatch: u16, part: usize) -> Option<PartArray> {
        match &self.kind {
            FfnKind::Driven(mesh) => mesh.part_array(microbatch, part),
            FfnKind::Threaded(engine) => engine.part_array(microbatch, part),
        }
    }

    /// The oldest batch of these microbatches, of any if none are named, that the policy allows, if there is one now.
    pub(crate) fn try_next_batch(
        &mut self,
        policy: Policy,
        microbatches: Option<&[u16]>,
    ) -> Result<Option<Batch>, MeshError> {
        let is_wanted = |microbatch: u16| microbatches.is_none_or(|wanted| wanted.contains(&microbatch));
        let batch = match &mut self.kind {
            FfnKind::Driven(mesh) => mesh.try_next_batch_of(policy, is_wanted),
            FfnKind::Threaded(engine) => engine.try_next_batch_of(policy, is_wanted)?,
        };
        self.due = match (&batch, &self.kind) {
            (Some(_), _) => None,
            (None, FfnKind::Driven(mesh)) => mesh.next_release(policy),
            (None, FfnKind::Threaded(engine)) => engine.next_release(policy),
        };
        Ok(batch)
    }

    pub(crate) fn respond(&mut self, batch: Batch) -> Result<(), MeshError> {
        match &mut self.kind {
            FfnKind::Driven(mesh) => mesh.respond(batch),
            FfnKind::Threaded(engine) => engine.respond(batch),
        }
    }

    pub(crate) fn send_control(&mut self, body: from_member::Body) -> Result<(), MeshError> {
        match &mut self.kind {
            FfnKind::Driven(mesh) => mesh.send_control(body),
            FfnKind::Threaded(engine) => engine.send_control(body),
        }
    }

    fn next_event(&mut self) -> Option<MeshEvent> {
        match &mut self.kind {
            FfnKind::Driven(mesh) => mesh.next_event(),
            FfnKind::Threaded(engine) => engine.next_event(),
        }
    }
}

impl Driven for Ffn {
    fn poll(&mut self) -> Result<(), MeshError> {
        if let FfnKind::Driven(mesh) = &mut self.kind {
            mesh.poll()?;
        }
        while let Some(event) = self.next_event() {
            if let Some(answer) = self.news.take_in(event) {
                // A scheduler that is lost is an event of its own.
                let _ = self.send_control(answer);
            }
        }
        Ok(())
    }

    fn settled(&mut self) -> u64 {
        let arrived = match &self.kind {
            FfnKind::Driven(mesh) => mesh.arrived(),
            FfnKind::Threaded(engine) => engine.arrived(),
        };
        arrived << 16 | (self.news.events.len() + self.news.released.len()) as u64
    }

    fn sleep(&mut self, deadline: Instant) -> Result<(), MeshError> {
        let deadline = self.due.map_or(deadline, |due| due.min(deadline));
        match &mut self.kind {
            FfnKind::Driven(mesh) => mesh.sleep(deadline),
            FfnKind::Threaded(engine) => engine.sleep(deadline.saturating_duration_since(Instant::now())),
        }
    }
}
