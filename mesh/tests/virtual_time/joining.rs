//! Joining: what is refused, by name and with figures, before anything is changed; barriers; several meshes at once.

use crate::world::{Shape, World};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, MeshError, MeshEvent, PartSpec, Request, Role, SlotLayout};
use stepmesh_proto::control::{BarrierEnter, BarrierGroup, from_member, to_member};
use stepmesh_transport::{Access, Device, Endpoint, Placement, Properties, Region, TransportError};

/// A device that counts the bytes allocated on it.
struct CountingDevice {
    inner: Arc<dyn Device>,
    allocated: Arc<AtomicUsize>,
}

impl Device for CountingDevice {
    fn properties(&self) -> Properties {
        self.inner.properties()
    }

    fn allocate(&self, len: usize, access: Access, placement: Option<Placement>) -> Result<Region, TransportError> {
        self.allocated.fetch_add(len, Ordering::Relaxed);
        self.inner.allocate(len, access, placement)
    }

    fn endpoint(&self) -> Result<Box<dyn Endpoint>, TransportError> {
        self.inner.endpoint()
    }
}

/// Joins with these options; returns the error that comes of it, and the bytes that were allocated.
fn join(world: &mut World, role: Role, options: MemberOptions) -> (Result<(), MeshError>, usize) {
    let (_, device, _, control) = world.seat(role, 0);
    let allocated = Arc::new(AtomicUsize::new(0));
    let device = Arc::new(CountingDevice { inner: device, allocated: allocated.clone() });
    let (control, clock) = (Box::new(control), world.clock.clone());
    let mut outcome = Ok(());
    let mut attempt = |world: &mut World, poll: &mut dyn FnMut() -> Result<(), MeshError>| {
        for _ in 0..100 {
            world.turn();
            outcome = poll();
            if outcome.is_err() {
                break;
            }
        }
    };
    match role {
        Role::Attention => {
            let mut mesh = AttentionMesh::new(options, device, control, clock).unwrap();
            attempt(world, &mut || mesh.poll());
        }
        Role::Ffn => {
            let mut mesh = FfnMesh::new(options, device, control, clock).unwrap();
            attempt(world, &mut || mesh.poll());
        }
    }
    (outcome, allocated.load(Ordering::Relaxed))
}

fn assert_refused(outcome: Result<(), MeshError>, words: &[&str]) {
    let Err(MeshError::Refused(reason)) = outcome else { panic!("{outcome:?}") };
    for words in words {
        assert!(reason.contains(words), "`{reason}` does not say `{words}`");
    }
}

#[test]
fn slots_beyond_the_memory_limit_are_refused_with_figures_before_anything_is_allocated() {
    for role in [Role::Attention, Role::Ffn] {
        let mut world = World::deserted(Shape::new(4, 4));
        let mut options = world.options(0);
        options.memory_limit_bytes = 10_000;
        let needed = options.layout.member_bytes(role == Role::Attention, 4).unwrap();
        let (outcome, allocated) = join(&mut world, role, options);
        assert_eq!(allocated, 0);
        let Err(error @ MeshError::Memory { .. }) = outcome else { panic!("{outcome:?}") };
        let words = error.to_string();
        for figure in [needed.to_string().as_str(), "10000", "4 peers", "16x64B", "raise the limit"] {
            assert!(words.contains(figure), "{words}");
        }
    }
}

#[test]
fn what_a_complete_member_allocates_is_what_was_computed() {
    let mut world = World::deserted(Shape::new(1, 2));
    world.start(Role::Ffn, 0);
    world.start(Role::Ffn, 1);
    let options = world.options(0);
    let needed = options.layout.member_bytes(true, 2).unwrap();
    let (outcome, allocated) = join(&mut world, Role::Attention, options);
    outcome.unwrap();
    assert!(allocated > 0 && allocated <= needed, "{allocated} of {needed}");
}

#[test]
fn another_layout_workload_or_number_of_lanes_is_refused_by_name() {
    let mut world = World::deserted(Shape::new(2, 2));
    world.start(Role::Attention, 0);
    world.run_for(std::time::Duration::from_millis(2));
    let mut options = world.options(1);
    options.layout = Arc::new(SlotLayout::new(3, vec![PartSpec { row_bytes: 65, max_rows: 16 }], vec![]).unwrap());
    assert_refused(join(&mut world, Role::Ffn, options).0, &["layout", "16x64B", "16x65B"]);
    let mut options = world.options(1);
    options.workload = "another model".into();
    assert_refused(join(&mut world, Role::Ffn, options).0, &["workload", "echo", "another model"]);
    let mut options = world.options(1);
    options.lanes = 7;
    assert_refused(join(&mut world, Role::Attention, options).0, &["lanes", "`2`", "`7`"]);
}

#[test]
fn a_rank_out_of_range_or_taken_is_refused_by_name() {
    let mut world = World::new(Shape::new(2, 1));
    let options = world.options(5);
    assert_refused(join(&mut world, Role::Attention, options).0, &["attention rank 5 is out of range", "ranks 0 to 1"]);
    let options = world.options(0);
    assert_refused(join(&mut world, Role::Ffn, options).0, &["that rank is taken by FFN rank 0 (ffn-0-"]);
    let mut options = world.options(0);
    options.rank = None;
    assert_refused(join(&mut world, Role::Attention, options).0, &["all 2 attention ranks are taken"]);
    world.exercise(0);
}

#[test]
fn impossible_lanes_are_refused_at_once() {
    let mut world = World::deserted(Shape::new(1, 1));
    for lanes in [0, 9] {
        let mut options = world.options(0);
        options.lanes = lanes;
        let (_, device, _, control) = world.seat(Role::Attention, 0);
        let refused = AttentionMesh::new(options, device, Box::new(control), world.clock.clone());
        let error = refused.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(&format!("{lanes} lanes")), "{error}");
    }
}

#[test]
fn barriers_release_everybody_at_once() {
    let mut world = World::new(Shape::new(2, 1));
    world.clear_events();
    let enter = |world: &mut World, role, rank| {
        let enter = BarrierEnter { name: "warm".into(), group: BarrierGroup::All as i32 };
        let body = from_member::Body::BarrierEnter(enter);
        match role {
            Role::Attention => world.attention(rank).send_control(body).unwrap(),
            Role::Ffn => world.ffn(rank).mesh.send_control(body).unwrap(),
        }
    };
    let released = |world: &mut World, role, rank| {
        world.events(role, rank).iter().any(|event| {
            matches!(event, MeshEvent::Control(to_member::Body::BarrierReleased(released))
                if released.name == "warm" && released.broken.is_empty())
        })
    };
    enter(&mut world, Role::Attention, 0);
    enter(&mut world, Role::Ffn, 0);
    world.run_for(std::time::Duration::from_millis(10));
    assert!(!released(&mut world, Role::Attention, 0), "one is missing");
    enter(&mut world, Role::Attention, 1);
    world.run_for(std::time::Duration::from_millis(10));
    for (role, rank) in [(Role::Attention, 0), (Role::Attention, 1), (Role::Ffn, 0)] {
        assert!(released(&mut world, role, rank), "{role} {rank}");
    }
}

#[test]
fn several_meshes_live_in_one_process_and_do_not_mix() {
    let mut worlds = [World::new(Shape::new(1, 1)), World::new(Shape::new(1, 1))];
    for world in &mut worlds {
        world.ffn(0).serves = false;
    }
    let sent = worlds.each_mut().map(|world| world.send(0, 0, 0, 3).unwrap());
    worlds.iter_mut().for_each(|world| world.run_for(std::time::Duration::from_millis(1)));
    let batches = worlds.each_mut().map(|world| world.ffn(0).take().unwrap());
    let [first, second] = batches;
    // Answered by the wrong mesh: the same incarnation, rank and microbatch, and yet another link.
    worlds[1].ffn(0).mesh.respond(first).unwrap();
    worlds[1].run_for(std::time::Duration::from_millis(1));
    assert!(worlds[1].is_pending(&sent[1]));
    worlds[1].ffn(0).respond(second);
    worlds[1].finish(&sent[1]);
    assert!(worlds[0].is_pending(&sent[0]));

    let foreign = worlds[0].attention(0).acquire(1).unwrap();
    let refused = worlds[1].attention(0).push_pull(foreign, Request::default()).map(|_| ());
    assert!(matches!(refused, Err(MeshError::Transfer(why)) if why.contains("another mesh")));
}
