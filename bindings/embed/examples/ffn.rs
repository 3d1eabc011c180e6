//! An FFN side in Rust for an attention side in Python: `ffn SCHEDULER_URL`, and bindings/python/examples/launch.py
//! `--rust` starts both. Answers each row with the silu of its first half times the second, until the other side has gone.

use std::error::Error;
use std::time::Duration;
use stepmesh_embed::Joining;
use stepmesh_mesh::control::ConnectOptions;
use stepmesh_mesh::{MemberOptions, MeshEvent, PartSpec, Policy, Segment, SlotLayout};
use stepmesh_proto::{Dtype, Part};
use stepmesh_transport::{DeviceOptions, Provider};

const HIDDEN: usize = 64;
const ROWS: u32 = 16;

fn answer(segment: &mut Segment) -> Result<(), Box<dyn Error>> {
    let rows = segment.rows();
    let (input, output) = segment.split(0, 0);
    let value = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (row, out) in input.chunks_exact(HIDDEN * 4).zip(output.chunks_exact_mut(HIDDEN * 2)) {
        let (gate, up) = row.split_at(HIDDEN * 2);
        for ((gate, up), out) in gate.chunks_exact(4).zip(up.chunks_exact(4)).zip(out.chunks_exact_mut(4)) {
            let gate = value(gate);
            out.copy_from_slice(&(gate / (1.0 + (-gate).exp()) * value(up)).to_le_bytes());
        }
    }
    let part = Part { dtype: Dtype::F32, rows: rows as u32, row_bytes: HIDDEN as u32 * 2, ..Part::default() };
    Ok(segment.set_reply(&[part])?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::args().nth(1).ok_or("usage: ffn SCHEDULER_URL")?;
    let spec = |row_bytes: usize| vec![PartSpec { row_bytes: row_bytes as u32, max_rows: ROWS }];
    let layout = SlotLayout::new(1, spec(HIDDEN * 4), spec(HIDDEN * 2))?;
    let joining = Joining {
        member: MemberOptions::new(layout, "gated rows"),
        connect: ConnectOptions::new(url),
        provider: Provider::Shm,
        device: DeviceOptions::default(),
    };
    let mut mesh = joining.ffn(|| false)?;
    mesh.wait_complete(Duration::from_secs(30))?;
    let mut answered = 0;
    loop {
        if let Some(mut batch) = mesh.next_batch(Policy::All, Duration::from_secs(1))? {
            batch.segments.iter_mut().try_for_each(answer)?;
            mesh.respond(batch)?;
            answered += 1;
        }
        while let Some(event) = mesh.next_event() {
            if matches!(event, MeshEvent::PeerLost { .. } | MeshEvent::SchedulerLost(_)) {
                println!("{answered} batches answered");
                return Ok(());
            }
        }
    }
}
