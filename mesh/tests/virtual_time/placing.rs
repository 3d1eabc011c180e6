//! Where payloads lie: one array over all attention instances, and with mapping the very memory that they filled.

use crate::world::{Shape, World};
use std::time::Duration;
use stepmesh_mesh::PartSpec;

fn world(maps: bool) -> World {
    let parts = vec![PartSpec { row_bytes: 100, max_rows: 30 }, PartSpec { row_bytes: 8, max_rows: 30 }];
    World::new(Shape { maps, parts, ..Shape::new(4, 2) })
}

#[test]
fn a_part_of_all_ranks_is_one_array_with_a_fixed_stride() {
    for maps in [false, true] {
        let mut world = world(maps);
        (0..2).for_each(|rank| world.ffn(rank).serves = false);
        for rank in 0..4 {
            world.send(rank, 2, 0, 30).unwrap();
        }
        world.run_for(Duration::from_millis(5));
        let mut seen = 0;
        while let Some(batch) = world.ffn(1).take() {
            for segment in &batch.segments {
                for part in 0..2 {
                    let array = world.ffn(1).mesh.part_array(2, part).unwrap();
                    let at = segment.part(part).as_ptr() as usize;
                    assert_eq!(at, array.base + segment.rank() * array.rank_stride_bytes);
                    assert_eq!(array.rank_stride_bytes % 4096, 0);
                    seen += 1;
                }
            }
        }
        assert_eq!(seen, 8);
        assert!(world.ffn(1).mesh.part_array(3, 0).is_none() && world.ffn(1).mesh.part_array(0, 2).is_none());
    }
}

#[test]
fn with_mapping_every_ffn_instance_reads_the_memory_that_the_attention_side_fills() {
    for maps in [false, true] {
        let mut world = world(maps);
        for rank in 0..4 {
            let mut buffer = world.attention(rank).acquire(1).unwrap();
            // Filled and not sent: whoever sees it shares the memory.
            buffer.part_mut(0)[..8].copy_from_slice(&(0xabcd_0000 + u64::from(rank)).to_le_bytes());
            for ffn in 0..2 {
                let array = world.ffn(ffn).mesh.part_array(1, 0).unwrap();
                let at = array.base + rank as usize * array.rank_stride_bytes;
                // SAFETY: the part's first row is mapped for as long as the link is up, and nobody writes it now.
                let seen = unsafe { std::ptr::with_exposed_provenance::<u64>(at).read_unaligned() };
                assert_eq!(seen == 0xabcd_0000 + u64::from(rank), maps, "rank {rank} as ffn {ffn} sees it");
            }
        }
    }
}
