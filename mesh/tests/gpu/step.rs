//! A step of layers and microbatches as one graph on each side. The FFN's "layer" turns a tensor by one byte, so that its
//! result says how many layers it has seen, and in which order.

use super::{BYTES, PATIENCE, SLOTS, finish, host, part, span, whole};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_mesh::{AttentionMesh, AttentionStep, Batch, FfnMesh, FfnStep, FfnWork, MeshError, Segment, Transfer};
use stepmesh_transport::cuda::{Context, CudaError, DeviceMemory, Gates, Graph, Span, Stream};
use stepmesh_transport::{GateSet, Region};

const LAYERS: usize = 8;
const MICROBATCHES: usize = SLOTS as usize;

/// The microbatches of all transfers, layer by layer.
fn microbatches() -> Vec<u16> {
    transfers().iter().map(|transfer| transfer.microbatch).collect()
}

fn transfers() -> Vec<Transfer> {
    let transfer = |index: usize| Transfer {
        microbatch: (index % MICROBATCHES) as u16,
        group: (index / MICROBATCHES) as u32,
        parts: vec![part()],
        app: [0; 16],
    };
    (0..LAYERS * MICROBATCHES).map(transfer).collect()
}

/// What one side replays.
struct Captured {
    gates: Arc<Gates>,
    stream: Stream,
    graph: Graph,
}

impl Captured {
    fn new(work: impl FnOnce(&Gates, &Stream) -> Result<(), CudaError>) -> Self {
        let context = Context::open(0).unwrap();
        let (stream, gates) =
            (Stream::new(&context).unwrap(), Arc::new(Gates::new(&context, LAYERS * MICROBATCHES).unwrap()));
        let graph = Graph::capture(&stream, |stream| work(&gates, stream)).unwrap();
        Self { gates, stream, graph }
    }
}

fn on_device() -> Region {
    Region::new(DeviceMemory::allocate(&Context::open(0).unwrap(), BYTES).unwrap())
}

fn within(place: &(Region, Range<usize>), range: Range<usize>) -> Span {
    let start = place.1.start;
    Span::new(&place.0, start + range.start..start + range.end).unwrap()
}

fn capture_ffn(mesh: &FfnMesh) -> Captured {
    let tensor = on_device();
    Captured::new(|gates, stream| {
        for index in 0..gates.len() {
            let microbatch = (index % MICROBATCHES) as u16;
            let (request, reply) =
                (mesh.request_place(0, microbatch, 0).unwrap(), mesh.reply_place(0, microbatch, 0).unwrap());
            let gate = gates.gate(index).unwrap();
            gate.pass(stream)?;
            stream.copy(&span(request), &whole(&tensor))?;
            stream.copy(&Span::new(&tensor, 1..BYTES).unwrap(), &within(&reply, 0..BYTES - 1))?;
            stream.copy(&Span::new(&tensor, 0..1).unwrap(), &within(&reply, BYTES - 1..BYTES))?;
            gate.announce(stream)?;
        }
        Ok(())
    })
}

/// Counts, and vanishes after so many.
struct Work(usize);

impl FfnWork for Work {
    fn arrived(&mut self, transfer: usize, batch: &Batch) -> Result<(), MeshError> {
        assert_eq!(
            (batch.group as usize, usize::from(batch.microbatch)),
            (transfer / MICROBATCHES, transfer % MICROBATCHES)
        );
        self.0 = self.0.checked_sub(1).ok_or(MeshError::Timeout(Duration::ZERO))?;
        Ok(())
    }

    fn answer(&mut self, _: usize, segment: &mut Segment) -> Result<(), MeshError> {
        segment.set_reply(&[part()])
    }
}

/// The FFN side of so many replays.
pub(crate) fn serve(mut mesh: FfnMesh, replays: u32) {
    mesh.wait_complete(PATIENCE).unwrap();
    let captured = capture_ffn(&mesh);
    let mut step = FfnStep::new(captured.gates.clone(), microbatches()).unwrap();
    let started = Instant::now();
    for replay in 0..replays {
        captured.graph.launch(&captured.stream).unwrap();
        assert!(step.run(&mut mesh, &mut Work(usize::MAX), PATIENCE).unwrap(), "replay {replay}");
        finish(&captured.stream);
    }
    while mesh.is_complete() && started.elapsed() < PATIENCE {
        mesh.poll().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Serves so many replays, and goes in the middle of the next after so many transfers.
pub(crate) fn serve_and_vanish(mut mesh: FfnMesh, replays: u32, transfers_of_last: usize) {
    mesh.wait_complete(PATIENCE).unwrap();
    let captured = capture_ffn(&mesh);
    let mut step = FfnStep::new(captured.gates.clone(), microbatches()).unwrap();
    for replay in 0..=replays {
        captured.graph.launch(&captured.stream).unwrap();
        let mut work = Work(if replay < replays { usize::MAX } else { transfers_of_last });
        let outcome = step.run(&mut mesh, &mut work, PATIENCE);
        assert_eq!(outcome.is_ok(), replay < replays, "{outcome:?}");
        finish(&captured.stream);
    }
    assert!(captured.gates.is_aborted() && step.run(&mut mesh, &mut Work(0), PATIENCE).is_err());
    // Memory is freed when nothing waits at a gate any more, so the other side has to hear of this first.
    drop((step, mesh));
}

struct Attention {
    captured: Captured,
    step: AttentionStep,
    input: Region,
    result: Region,
}

impl Attention {
    fn new(mesh: &mut AttentionMesh) -> Self {
        mesh.wait_complete(PATIENCE).unwrap();
        let states: Vec<_> = (0..MICROBATCHES).map(|_| on_device()).collect();
        let (input, result) = (host(), super::host_of(MICROBATCHES * BYTES));
        let captured = Captured::new(|gates, stream| {
            let land = |index: usize| {
                let microbatch = index % MICROBATCHES;
                gates.gate(index).unwrap().pass(stream)?;
                stream.copy(&span(mesh.reply_place(0, microbatch as u16, 0).unwrap()), &whole(&states[microbatch]))
            };
            for state in &states {
                stream.copy(&whole(&input), &whole(state))?;
            }
            for index in 0..gates.len() {
                if let Some(before) = index.checked_sub(MICROBATCHES) {
                    land(before)?;
                }
                let microbatch = index % MICROBATCHES;
                stream.copy(&whole(&states[microbatch]), &span(mesh.request_place(microbatch as u16, 0).unwrap()))?;
                gates.gate(index).unwrap().announce(stream)?;
            }
            (gates.len() - MICROBATCHES..gates.len()).try_for_each(land)?;
            for (microbatch, state) in states.iter().enumerate() {
                let place = microbatch * BYTES..(microbatch + 1) * BYTES;
                stream.copy(&whole(state), &Span::new(&result, place).unwrap())?;
            }
            Ok(())
        });
        let step = AttentionStep::new(captured.gates.clone(), transfers()).unwrap();
        Self { captured, step, input, result }
    }

    fn replay(&mut self, mesh: &mut AttentionMesh, number: u32) -> Result<(), MeshError> {
        let mut bytes: Vec<u8> = (0..BYTES).map(|at| (at as u32 * 31 + number) as u8).collect();
        self.input.write(0, &bytes).unwrap();
        self.captured.graph.launch(&self.captured.stream).unwrap();
        let outcome = self.step.run(mesh, PATIENCE);
        finish(&self.captured.stream);
        outcome?;
        bytes.rotate_left(LAYERS);
        let mut found = vec![0; MICROBATCHES * BYTES];
        self.result.read(0, &mut found).unwrap();
        assert!(found == bytes.repeat(MICROBATCHES), "replay {number}");
        Ok(())
    }
}

/// The attention side of so many replays.
pub(crate) fn ask(mut mesh: AttentionMesh, replays: u32) {
    let mut attention = Attention::new(&mut mesh);
    for number in 0..replays {
        attention.replay(&mut mesh, number).unwrap();
    }
}

/// So many replays, and one during which the peer goes.
pub(crate) fn ask_until_lost(mut mesh: AttentionMesh, replays: u32) {
    let mut attention = Attention::new(&mut mesh);
    for number in 0..replays {
        attention.replay(&mut mesh, number).unwrap();
    }
    let started = Instant::now();
    let error = attention.replay(&mut mesh, replays).unwrap_err();
    assert!(!matches!(error, MeshError::Timeout(_)) && started.elapsed() < PATIENCE / 3, "{error}");
    let gates = &attention.captured.gates;
    assert!(gates.is_aborted(), "what it computed is worth nothing");
    assert!(attention.step.run(&mut mesh, PATIENCE).unwrap_err().to_string().contains("given up"));
    gates.reset(&attention.captured.stream).unwrap();
    assert!(attention.replay(&mut mesh, 0).is_err(), "there is nobody to answer");
}
