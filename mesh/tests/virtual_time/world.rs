//! A deployment whose FFN instances answer each byte `b` of a request with `b + rank + 1`.

use crate::control::{Plane, SimControl};
use crate::rogue::Rogue;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use stepmesh_mesh::scheduler::Session;
use stepmesh_mesh::{
    AttentionMesh, Batch, FfnMesh, MemberOptions, MeshError, MeshEvent, PartSpec, Policy, Replies, Request, Role,
    Segment, SlotLayout, Ticket, TicketStatus,
};
use stepmesh_proto::Part;
use stepmesh_transport::mem::{Fabric, FabricOptions};
use stepmesh_transport::{Clock, Device};

/// A deployment's shape and manners.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) seed: u64,
    pub(crate) attention: u32,
    pub(crate) ffn: u32,
    pub(crate) microbatches: u16,
    /// Of requests and replies alike.
    pub(crate) parts: Vec<PartSpec>,
    pub(crate) lanes: u8,
    pub(crate) stripe_bytes: usize,
    pub(crate) maps: bool,
    pub(crate) latency: Range<Duration>,
    pub(crate) lane_skew: Range<Duration>,
    pub(crate) control_latency: Range<Duration>,
    pub(crate) queue_depth: usize,
    pub(crate) drain: Duration,
    /// The least that time moves in a turn.
    pub(crate) grain: Duration,
}

impl Shape {
    pub(crate) fn new(attention: u32, ffn: u32) -> Self {
        Self {
            seed: 1,
            attention,
            ffn,
            microbatches: 3,
            parts: vec![PartSpec { row_bytes: 64, max_rows: 16 }],
            lanes: 2,
            stripe_bytes: 1,
            maps: false,
            latency: Duration::from_micros(2)..Duration::from_micros(30),
            lane_skew: Duration::ZERO..Duration::from_micros(20),
            control_latency: Duration::from_micros(50)..Duration::from_micros(500),
            queue_depth: 128,
            drain: Duration::from_millis(100),
            grain: Duration::from_nanos(1),
        }
    }

    pub(crate) fn layout(&self) -> SlotLayout {
        SlotLayout::new(self.microbatches, self.parts.clone(), self.parts.clone()).unwrap()
    }
}

/// An FFN instance and its application.
pub(crate) struct Ffn {
    pub(crate) mesh: FfnMesh,
    /// Answers at once; otherwise the test does.
    pub(crate) serves: bool,
    pub(crate) policy: Policy,
    pub(crate) answer: fn(&mut Segment, usize),
    /// What it has answered: microbatch, group, ranks.
    pub(crate) answered: Vec<(u16, u32, Vec<usize>)>,
}

impl Ffn {
    /// The next batch that the policy allows.
    pub(crate) fn take(&mut self) -> Option<Batch> {
        self.mesh.try_next_batch(self.policy)
    }

    pub(crate) fn respond(&mut self, mut batch: Batch) {
        let rank = self.mesh.rank().unwrap() as usize;
        let ranks = batch.segments.iter().map(Segment::rank).collect();
        self.answered.push((batch.microbatch, batch.group, ranks));
        batch.segments.iter_mut().for_each(|segment| (self.answer)(segment, rank));
        self.mesh.respond(batch).unwrap();
    }
}

pub(crate) enum Node {
    Attention(AttentionMesh),
    Ffn(Ffn),
    Rogue(Rogue),
}

pub(crate) struct Place {
    pub(crate) role: Role,
    pub(crate) rank: u32,
    pub(crate) device: String,
    pub(crate) session: Session,
    pub(crate) node: Option<Node>,
    pub(crate) events: Vec<MeshEvent>,
}

pub(crate) struct World {
    pub(crate) fabric: Fabric,
    pub(crate) clock: Clock,
    pub(crate) plane: Plane,
    pub(crate) places: Vec<Place>,
    pub(crate) random: SmallRng,
    pub(crate) shape: Shape,
    started: usize,
}

/// A request under way and what was in it.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) rank: u32,
    pub(crate) ticket: Ticket,
    pub(crate) parts: Vec<(Part, Vec<u8>)>,
}

impl World {
    /// A complete deployment.
    pub(crate) fn new(shape: Shape) -> Self {
        let mut world = Self::deserted(shape);
        for rank in 0..world.shape.attention {
            world.start(Role::Attention, rank);
        }
        for rank in 0..world.shape.ffn {
            world.start(Role::Ffn, rank);
        }
        world.run_until("complete", World::is_complete);
        world
    }

    /// A scheduler only.
    pub(crate) fn deserted(shape: Shape) -> Self {
        let mut random = SmallRng::seed_from_u64(shape.seed);
        let fabric = Fabric::new(FabricOptions {
            seed: random.random(),
            latency: shape.latency.clone(),
            lane_skew: shape.lane_skew.clone(),
            queue_depth: shape.queue_depth,
            maps_peer_memory: shape.maps,
            ..FabricOptions::default()
        });
        let clock = fabric.clock();
        let plane =
            Plane::new(shape.attention, shape.ffn, clock.clone(), shape.control_latency.clone(), random.random());
        Self { fabric, clock, plane, places: Vec::new(), random, shape, started: 0 }
    }

    pub(crate) fn options(&self, rank: u32) -> MemberOptions {
        let mut options = MemberOptions::new(self.shape.layout(), "echo");
        options.rank = Some(rank);
        options.lanes = self.shape.lanes;
        options.stripe_bytes = self.shape.stripe_bytes;
        options.drain = self.shape.drain;
        options
    }

    /// A fresh device and session.
    pub(crate) fn seat(&mut self, role: Role, rank: u32) -> (String, Arc<dyn Device>, Session, SimControl) {
        self.started += 1;
        let name = format!("{role}-{rank}-{}", self.started);
        let device = self.fabric.device(name.as_str());
        let (session, control) = self.plane.connect();
        (name, device, session, control)
    }

    pub(crate) fn start(&mut self, role: Role, rank: u32) {
        let options = self.options(rank);
        self.start_with(role, rank, options);
    }

    pub(crate) fn start_with(&mut self, role: Role, rank: u32, mut options: MemberOptions) {
        let (name, device, session, control) = self.seat(role, rank);
        options.name.clone_from(&name);
        let (control, clock) = (Box::new(control), self.clock.clone());
        let node = match role {
            Role::Attention => Node::Attention(AttentionMesh::new(options, device, control, clock).unwrap()),
            Role::Ffn => Node::Ffn(Ffn {
                mesh: FfnMesh::new(options, device, control, clock).unwrap(),
                serves: true,
                policy: Policy::All,
                answer: add_rank,
                answered: Vec::new(),
            }),
        };
        self.places.push(Place { role, rank, device: name, session, node: Some(node), events: Vec::new() });
    }

    pub(crate) fn start_rogue(&mut self, role: Role, rank: u32) {
        let (name, device, session, control) = self.seat(role, rank);
        let layout = self.shape.layout();
        let node = Rogue::new(role, rank, device, control, layout, self.shape.lanes);
        let node = Some(Node::Rogue(node));
        self.places.push(Place { role, rank, device: name, session, node, events: Vec::new() });
    }

    pub(crate) fn place(&mut self, role: Role, rank: u32) -> &mut Place {
        let place = self.places.iter_mut().rev().find(|place| (place.role, place.rank) == (role, rank));
        place.unwrap()
    }

    pub(crate) fn attention(&mut self, rank: u32) -> &mut AttentionMesh {
        match &mut self.place(Role::Attention, rank).node {
            Some(Node::Attention(mesh)) => mesh,
            _ => panic!("attention {rank} is no honest member"),
        }
    }

    pub(crate) fn ffn(&mut self, rank: u32) -> &mut Ffn {
        match &mut self.place(Role::Ffn, rank).node {
            Some(Node::Ffn(ffn)) => ffn,
            _ => panic!("ffn {rank} is no honest member"),
        }
    }

    pub(crate) fn rogue(&mut self, role: Role, rank: u32) -> &mut Rogue {
        match &mut self.place(role, rank).node {
            Some(Node::Rogue(rogue)) => rogue,
            _ => panic!("{role} {rank} is no rogue"),
        }
    }

    pub(crate) fn device(&mut self, role: Role, rank: u32) -> String {
        self.place(role, rank).device.clone()
    }

    /// What a member was told besides its answers, since it was last asked.
    pub(crate) fn events(&mut self, role: Role, rank: u32) -> Vec<MeshEvent> {
        std::mem::take(&mut self.place(role, rank).events)
    }

    /// Forgets all events so far.
    pub(crate) fn clear_events(&mut self) {
        self.places.iter_mut().for_each(|place| place.events.clear());
    }

    /// A process dies as by `kill -9`.
    pub(crate) fn kill(&mut self, role: Role, rank: u32) {
        let place = self.place(role, rank);
        let (device, session) = (place.device.clone(), place.session);
        place.node = None;
        self.fabric.kill(&device);
        self.plane.disconnect(session);
    }

    /// Every honest attention instance is linked with all FFN instances, and the scheduler is content.
    pub(crate) fn is_complete(&mut self) -> bool {
        self.plane.state.status().complete
            && self.places.iter().all(|place| match &place.node {
                Some(Node::Attention(mesh)) => mesh.is_linked(),
                Some(Node::Ffn(ffn)) => ffn.mesh.is_complete(),
                _ => true,
            })
    }

    /// Everyone does what there is to do now, in some order; then time moves to the next event.
    pub(crate) fn turn(&mut self) {
        self.turn_with(|error| panic!("a poll failed: {error}"));
    }

    pub(crate) fn turn_with(&mut self, mut on_error: impl FnMut(MeshError)) {
        self.plane.relay();
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.shuffle(&mut self.random);
        for index in order {
            let Place { node, events, .. } = &mut self.places[index];
            let polled = match node {
                Some(Node::Attention(mesh)) => {
                    let polled = mesh.poll();
                    events.extend(std::iter::from_fn(|| mesh.next_event()));
                    polled
                }
                Some(Node::Ffn(ffn)) => {
                    let polled = ffn.mesh.poll();
                    events.extend(std::iter::from_fn(|| ffn.mesh.next_event()));
                    while ffn.serves
                        && let Some(batch) = ffn.take()
                    {
                        ffn.respond(batch);
                    }
                    polled
                }
                Some(Node::Rogue(rogue)) => {
                    rogue.poll();
                    Ok(())
                }
                None => Ok(()),
            };
            if let Err(error) = polled {
                on_error(error);
            }
        }
        let now = self.clock.now();
        let next = [self.fabric.next_event(), self.plane.next_event()].into_iter().flatten().min();
        // Members have time-outs of their own, which nobody announces.
        let step = next.map_or(Duration::from_millis(1), |next| next.saturating_duration_since(now));
        self.fabric.advance(step.clamp(self.shape.grain, Duration::from_millis(1)));
    }

    /// Lets time pass until it is so; a minute must do.
    pub(crate) fn run_until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let deadline = self.clock.now() + Duration::from_secs(60);
        while !is_so(self) {
            assert!(self.clock.now() < deadline, "not {what} within a minute: {:?}", self.plane.state.status());
            self.turn();
        }
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        let deadline = self.clock.now() + time;
        self.run_until("later", |world| world.clock.now() >= deadline);
    }

    /// Sends a request with so many rows of random bytes in each part.
    pub(crate) fn send(&mut self, rank: u32, microbatch: u16, group: u32, rows: u32) -> Result<Sent, MeshError> {
        self.send_as(rank, microbatch, Request { group, ..Request::default() }, &vec![rows; self.shape.parts.len()])
    }

    pub(crate) fn send_as(
        &mut self,
        rank: u32,
        microbatch: u16,
        request: Request<'_>,
        rows: &[u32],
    ) -> Result<Sent, MeshError> {
        let seed = self.random.random();
        let specs = self.shape.parts.clone();
        let mesh = self.attention(rank);
        let mut buffer = mesh.acquire(microbatch)?;
        let mut random = SmallRng::seed_from_u64(seed);
        let parts: Vec<_> = (1..)
            .zip(rows.iter().zip(&specs))
            .map(|(key, (&rows, spec))| {
                let mut bytes = vec![0; rows as usize * spec.row_bytes as usize];
                random.fill(bytes.as_mut_slice());
                buffer.part_mut(key as usize - 1)[..bytes.len()].copy_from_slice(&bytes);
                (Part { key, rows, row_bytes: spec.row_bytes, ..Part::default() }, bytes)
            })
            .collect();
        let used: Vec<Part> = parts.iter().map(|(part, _)| *part).collect();
        let ticket = mesh.push_pull(buffer, Request { parts: &used, ..request })?;
        Ok(Sent { rank, ticket, parts })
    }

    pub(crate) fn is_pending(&mut self, sent: &Sent) -> bool {
        self.attention(sent.rank).status(sent.ticket) == TicketStatus::Pending
    }

    /// Waits for the replies and checks every byte of them.
    pub(crate) fn finish(&mut self, sent: &Sent) {
        self.run_until("answered", |world| !world.is_pending(sent));
        let ffn = self.shape.ffn as usize;
        let reply = self.attention(sent.rank).take(sent.ticket).unwrap();
        assert_eq!(reply.ranks(), ffn);
        check(sent, &reply);
    }

    /// Sends and finishes one request on every slot of every attention instance.
    pub(crate) fn exercise(&mut self, group: u32) {
        let mut under_way = Vec::new();
        for rank in 0..self.shape.attention {
            for microbatch in 0..self.shape.microbatches {
                under_way.push(self.send(rank, microbatch, group, 4).unwrap());
            }
        }
        under_way.iter().for_each(|sent| self.finish(sent));
    }
}

/// Checks all replies to a request, byte by byte.
pub(crate) fn check(sent: &Sent, reply: &Replies) {
    for rank in 0..reply.ranks() {
        let keys = |part: &Part| (part.key, part.dtype, part.rows, part.row_bytes);
        let parts: Vec<_> = reply.parts(rank).iter().map(keys).collect();
        assert_eq!(parts, sent.parts.iter().map(|(part, _)| keys(part)).collect::<Vec<_>>());
        for (index, (_, bytes)) in sent.parts.iter().enumerate() {
            let expected = bytes.iter().map(|byte| byte.wrapping_add(rank as u8 + 1));
            assert!(
                reply.part(rank, index).iter().copied().eq(expected),
                "the reply of ffn {rank} is of another request"
            );
        }
    }
}

/// The default answer.
pub(crate) fn add_rank(segment: &mut Segment, ffn: usize) {
    let parts = segment.parts().to_vec();
    for part in 0..parts.len() {
        let (input, output) = segment.split(part, part);
        for (to, from) in output.iter_mut().zip(input) {
            *to = from.wrapping_add(ffn as u8 + 1);
        }
    }
    segment.set_reply(&parts).unwrap();
}
