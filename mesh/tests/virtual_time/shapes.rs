//! Any number of attention and FFN instances: every request reaches every FFN instance, every reply comes back by rank.

use crate::world::{Shape, World};
use stepmesh_mesh::{Request, Role, Segment};
use stepmesh_proto::{Dtype, Part};

/// Ratios, with and without mapping of peer memory.
fn shapes() -> impl Iterator<Item = Shape> {
    let ratios = [(1, 1), (2, 2), (3, 1), (1, 3), (4, 2)];
    ratios.into_iter().flat_map(|(attention, ffn)| {
        [false, true].map(|maps| Shape { maps, seed: u64::from(attention * 10 + ffn), ..Shape::new(attention, ffn) })
    })
}

#[test]
fn every_reply_of_every_ffn_instance_comes_back_by_rank() {
    for shape in shapes() {
        let mut world = World::new(shape);
        for group in 0..5 {
            world.exercise(group);
        }
    }
}

#[test]
fn a_broadcast_reaches_every_ffn_instance_once() {
    let mut world = World::new(Shape::new(2, 3));
    let sent = [world.send(0, 1, 7, 3).unwrap(), world.send(1, 1, 7, 4).unwrap()];
    sent.iter().for_each(|sent| world.finish(sent));
    for rank in 0..3 {
        let mut ranks: Vec<usize> = Vec::new();
        for (microbatch, group, of) in &world.ffn(rank).answered {
            assert_eq!((*microbatch, *group), (1, 7));
            ranks.extend(of);
        }
        ranks.sort_unstable();
        assert_eq!(ranks, [0, 1], "ffn {rank}");
    }
}

/// Instance `r` of `F` answers with `x · (r + 1)`: exact in f32 for small whole numbers.
fn partial_sum(segment: &mut Segment, ffn: usize) {
    let part = segment.parts()[0];
    let (input, output) = segment.split(0, 0);
    for (from, to) in input.chunks_exact(4).zip(output.chunks_exact_mut(4)) {
        let x = f32::from_le_bytes(from.try_into().unwrap());
        to.copy_from_slice(&(x * (ffn + 1) as f32).to_le_bytes());
    }
    segment.set_reply(&[part]).unwrap();
}

#[test]
fn partial_sums_add_up_over_every_shape() {
    for shape in shapes() {
        let mut world = World::new(shape);
        let (attention, ffn) = (world.shape.attention, world.shape.ffn);
        (0..ffn).for_each(|rank| world.ffn(rank).answer = partial_sum);
        for rank in 0..attention {
            let x: Vec<f32> = (0..16 * 3).map(|index| (index * 3 + rank) as f32).collect();
            let mesh = world.attention(rank);
            let mut buffer = mesh.acquire(0).unwrap();
            for (to, x) in buffer.part_mut(0).chunks_exact_mut(4).zip(&x) {
                to.copy_from_slice(&x.to_le_bytes());
            }
            let parts = [Part { dtype: Dtype::F32, rows: 3, row_bytes: 64, ..Part::default() }];
            let ticket = mesh.push_pull(buffer, Request { parts: &parts, ..Request::default() }).unwrap();
            world.run_until("answered", |world| {
                world.attention(rank).status(ticket) != stepmesh_mesh::TicketStatus::Pending
            });
            let reply = world.attention(rank).take(ticket).unwrap();
            let mut sum = vec![0.0; x.len()];
            for instance in 0..reply.ranks() {
                assert_eq!(reply.parts(instance)[0].dtype, Dtype::F32);
                for (sum, partial) in sum.iter_mut().zip(reply.part(instance, 0).chunks_exact(4)) {
                    *sum += f32::from_le_bytes(partial.try_into().unwrap());
                }
            }
            let factor = (ffn * (ffn + 1) / 2) as f32;
            assert_eq!(sum, x.iter().map(|x| x * factor).collect::<Vec<_>>());
        }
    }
}

#[test]
fn ranks_and_counts_are_known_once_complete() {
    let mut world = World::new(Shape::new(3, 2));
    for rank in 0..3 {
        assert_eq!((world.attention(rank).rank(), world.attention(rank).ffn()), (Some(rank), 2));
    }
    for rank in 0..2 {
        let mesh = &world.ffn(rank).mesh;
        assert_eq!((mesh.rank(), mesh.ffn(), mesh.attention()), (Some(rank), 2, 3));
    }
    assert!(!world.events(Role::Attention, 0).is_empty());
}
