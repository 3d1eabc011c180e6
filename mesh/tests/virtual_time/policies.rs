//! The four arrival policies and leaving, over the wire.

use crate::world::{Shape, World};
use std::time::Duration;
use stepmesh_mesh::{Batch, Policy, Segment};

/// Three attention instances, each of which has had one request answered on microbatch 0: all are participants.
fn world() -> World {
    let mut world = World::new(Shape::new(3, 1));
    let sent: Vec<_> = (0..3).map(|rank| world.send(rank, 0, 0, 1).unwrap()).collect();
    sent.iter().for_each(|sent| world.finish(sent));
    world.ffn(0).serves = false;
    world
}

fn take(world: &mut World, policy: Policy) -> Option<Batch> {
    world.run_for(Duration::from_millis(1));
    world.ffn(0).policy = policy;
    world.ffn(0).take()
}

fn ranks(batch: &Batch) -> Vec<usize> {
    batch.segments.iter().map(Segment::rank).collect()
}

#[test]
fn all_waits_for_every_participant_and_orders_by_rank() {
    let mut world = world();
    for rank in [2, 0] {
        world.send(rank, 0, 1, 1).unwrap();
        assert!(take(&mut world, Policy::All).is_none());
    }
    world.send(1, 0, 1, 1).unwrap();
    let batch = take(&mut world, Policy::All).unwrap();
    assert_eq!((batch.microbatch, batch.group, ranks(&batch)), (0, 1, vec![0, 1, 2]));
}

#[test]
fn all_releases_the_oldest_group_when_everybody_waits_on_another_one() {
    let mut world = world();
    for (rank, group) in [(0, 5), (1, 3), (2, 5)] {
        world.send(rank, 0, group, 1).unwrap();
        world.run_for(Duration::from_millis(1));
    }
    let batch = take(&mut world, Policy::All).unwrap();
    assert_eq!((batch.group, ranks(&batch)), (5, vec![0, 2]));
    assert_eq!(take(&mut world, Policy::All).map(|batch| ranks(&batch)), Some(vec![1]));
}

#[test]
fn any_takes_whoever_is_there() {
    let mut world = world();
    world.send(1, 0, 1, 1).unwrap();
    assert_eq!(take(&mut world, Policy::Any).map(|batch| ranks(&batch)), Some(vec![1]));
    assert!(take(&mut world, Policy::Any).is_none());
}

#[test]
fn at_least_n_waits_for_n() {
    let mut world = world();
    world.send(1, 0, 1, 1).unwrap();
    assert!(take(&mut world, Policy::AtLeast(2)).is_none());
    world.send(0, 0, 1, 1).unwrap();
    assert_eq!(take(&mut world, Policy::AtLeast(2)).map(|batch| ranks(&batch)), Some(vec![0, 1]));
}

#[test]
fn a_deadline_waits_no_longer_than_that() {
    let mut world = world();
    let policy = Policy::Deadline(Duration::from_millis(20));
    world.send(1, 0, 1, 1).unwrap();
    assert!(take(&mut world, policy).is_none());
    world.run_for(Duration::from_millis(20));
    assert_eq!(take(&mut world, policy).map(|batch| ranks(&batch)), Some(vec![1]));
}

#[test]
fn next_batch_returns_empty_handed_at_its_timeout() {
    let mut world = world();
    world.send(1, 0, 1, 1).unwrap();
    world.run_for(Duration::from_millis(1));
    assert!(world.ffn(0).mesh.next_batch(Policy::All, Duration::ZERO).unwrap().is_none());
    assert!(world.ffn(0).mesh.next_batch(Policy::Any, Duration::ZERO).unwrap().is_some());
}

#[test]
fn who_leaves_is_not_waited_for_until_its_next_request() {
    let mut world = world();
    world.attention(1).leave(0).unwrap();
    let last =
        world.send_as(2, 0, stepmesh_mesh::Request { group: 1, leave: true, ..Default::default() }, &[1]).unwrap();
    let first = world.send(0, 0, 1, 1).unwrap();
    let batch = take(&mut world, Policy::All).unwrap();
    assert_eq!(ranks(&batch), [0, 2], "a last request takes part, a leave does not");
    world.ffn(0).respond(batch);
    world.finish(&last);
    world.run_until("free", |world| world.attention(1).acquire(0).is_ok());
    world.finish(&first);
    world.send(1, 0, 7, 1).unwrap();
    world.run_for(Duration::from_millis(1));
    assert!(take(&mut world, Policy::All).is_none(), "rank 0 can still reach group 7");
}

#[test]
fn one_rank_prefills_while_another_decodes_and_a_third_idles() {
    let mut world = world();
    world.attention(2).leave(0).unwrap();
    world.ffn(0).serves = true;
    // Rank 0 goes through its 8 layers for each of 5 chunks, rank 1 for one token; both then leave.
    let mut left = [40_u32, 8];
    let mut under_way = [None, None];
    world.run_until("through", |world| {
        for rank in 0..2 {
            let slot = &mut under_way[rank];
            if let Some(sent) = slot.take_if(|sent| !world.is_pending(sent)) {
                world.finish(&sent);
                if left[rank] == 0 {
                    world.attention(rank as u32).leave(0).unwrap();
                }
            }
            if slot.is_none() && left[rank] > 0 {
                left[rank] -= 1;
                let layer = 7 - left[rank] % 8;
                *slot = Some(world.send(rank as u32, 0, layer, if rank == 0 { 16 } else { 1 }).unwrap());
            }
        }
        under_way.iter().all(Option::is_none)
    });
    let together = world.ffn(0).answered.iter().filter(|(_, _, ranks)| ranks.len() == 2).count();
    assert!(together >= 1, "they meet where they can");
}
