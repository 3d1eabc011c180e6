//! Gates and graphs: a step is captured once and replayed, and nobody waits for ever.

use crate::double::{context, finish, host, whole, with_driver};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_transport::cuda::{CudaError, DeviceMemory, Gates, Graph, Span, Stream};
use stepmesh_transport::{GateSet, Region};

const LAYERS: usize = 4;
const MICROBATCHES: usize = 3;

/// A step as attention captures it: for each layer and microbatch a tensor is announced, and its reply awaited.
struct Step {
    gates: Arc<Gates>,
    stream: Stream,
    graph: Graph,
    /// Where the "tensor" of each transfer is sent from, where its reply lands, and what is made of it in the end.
    sent: Region,
    landed: Region,
    result: Region,
}

const BYTES: usize = 8;

impl Step {
    fn capture() -> Self {
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let count = LAYERS * MICROBATCHES;
        let gates = Arc::new(Gates::new(&context, count).unwrap());
        let [state, end] = [(); 2].map(|()| Region::new(DeviceMemory::allocate(&context, count * BYTES).unwrap()));
        // Host memory stands for what a network device would reach.
        let [sent, landed, result] = [(); 3].map(|()| host(&vec![0; count * BYTES]));
        let graph = Graph::capture(&stream, |stream| {
            for layer in 0..LAYERS {
                for microbatch in 0..MICROBATCHES {
                    let (now, span) = (layer * MICROBATCHES + microbatch, |region: &Region, index: usize| {
                        Span::new(region, index * BYTES..(index + 1) * BYTES).unwrap()
                    });
                    if layer > 0 {
                        let before = now - MICROBATCHES;
                        gates.gate(before).unwrap().pass(stream)?;
                        stream.copy(&span(&landed, before), &span(&state, now))?;
                    }
                    stream.copy(&span(&state, now), &span(&sent, now))?;
                    gates.gate(now).unwrap().announce(stream)?;
                }
            }
            for last in count - MICROBATCHES..count {
                gates.gate(last).unwrap().pass(stream)?;
            }
            let all = Span::new(&end, 0..count * BYTES)?;
            stream.copy(&whole(&landed), &all)?;
            stream.copy(&all, &whole(&result))
        })
        .unwrap();
        Self { gates, stream, graph, sent, landed, result }
    }

    /// Plays the FFN side of one replay, up to so many transfers: a reply is its request and one. Returns how many came.
    fn serve(&self, most: usize) -> usize {
        let (mut served, started) = (0, Instant::now());
        while served < most {
            assert!(started.elapsed() < Duration::from_secs(30), "{served} of {most}");
            for index in 0..self.gates.len() {
                if served < most && self.gates.take(index) {
                    let mut word = [0; BYTES];
                    self.sent.read(index * BYTES, &mut word).unwrap();
                    let reply = (u64::from_le_bytes(word) + 1).to_le_bytes();
                    self.landed.write(index * BYTES, &reply).unwrap();
                    self.gates.open(index);
                    served += 1;
                }
            }
        }
        served
    }

    fn result(&self) -> Vec<u64> {
        let mut bytes = vec![0; LAYERS * MICROBATCHES * BYTES];
        self.result.read(0, &mut bytes).unwrap();
        bytes.as_chunks::<BYTES>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
    }
}

#[test]
fn a_step_with_its_transfers_is_captured_once_and_replayed_a_thousand_times() {
    with_driver("gates::a_step_with_its_transfers_is_captured_once_and_replayed_a_thousand_times", || {
        let step = Step::capture();
        assert!(step.stream.is_idle().unwrap(), "a capture does nothing");
        for replay in 0..1000 {
            let count = LAYERS * MICROBATCHES;
            step.landed.write(0, &vec![0; count * BYTES]).unwrap();
            step.graph.launch(&step.stream).unwrap();
            assert_eq!(step.serve(count), count);
            finish(&step.stream);
            let expected: Vec<u64> = (0..count).map(|index| (index / MICROBATCHES) as u64 + 1).collect();
            assert_eq!(step.result(), expected, "replay {replay}");
        }
        assert!((0..step.gates.len()).all(|index| !step.gates.take(index)), "every gate is closed");
    });
}

#[test]
fn a_replay_waits_at_a_gate_that_stays_closed() {
    with_driver("gates::a_replay_waits_at_a_gate_that_stays_closed", || {
        let step = Step::capture();
        step.graph.launch(&step.stream).unwrap();
        assert_eq!(step.serve(MICROBATCHES + 1), MICROBATCHES + 1);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!step.stream.is_idle().unwrap());
        assert!(matches!(step.gates.reset(&step.stream), Err(CudaError::Invalid(_))), "not while it is under way");
        step.serve(LAYERS * MICROBATCHES - MICROBATCHES - 1);
        finish(&step.stream);
    });
}

#[test]
fn an_abort_opens_every_gate_that_is_left_and_the_next_replay_is_right_again() {
    with_driver("gates::an_abort_opens_every_gate_that_is_left_and_the_next_replay_is_right_again", || {
        let step = Step::capture();
        for served in [0, 1, MICROBATCHES, 2 * MICROBATCHES + 1] {
            step.graph.launch(&step.stream).unwrap();
            step.serve(served);
            step.gates.abort();
            finish(&step.stream);
            assert!(step.gates.is_aborted(), "what it computed is worth nothing");
            step.gates.reset(&step.stream).unwrap();
            assert!(!step.gates.is_aborted());

            step.graph.launch(&step.stream).unwrap();
            std::thread::sleep(Duration::from_millis(10));
            assert!(!step.stream.is_idle().unwrap(), "no gate is left open");
            step.serve(LAYERS * MICROBATCHES);
            finish(&step.stream);
            assert_eq!(step.result()[0], 1);
        }
    });
}

#[test]
fn gates_that_are_dropped_open() {
    with_driver("gates::gates_that_are_dropped_open", || {
        let context = context();
        let (stream, gates) = (Stream::new(&context).unwrap(), Gates::new(&context, 2).unwrap());
        for gate in [0, 1] {
            gates.gate(gate).unwrap().pass(&stream).unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
        assert!(!stream.is_idle().unwrap(), "it waits");
        drop(gates);
        finish(&stream);
    });
}

#[test]
fn a_stream_that_waits_for_ever_is_dropped_without_waiting() {
    with_driver("gates::a_stream_that_waits_for_ever_is_dropped_without_waiting", || {
        let context = context();
        let gates = Gates::new(&context, 1).unwrap();
        let stream = Stream::new(&context).unwrap();
        gates.gate(0).unwrap().pass(&stream).unwrap();
        drop(stream);
        drop(gates);
    });
}

#[test]
fn numbers_of_gates_and_spans_that_make_no_sense_are_refused() {
    with_driver("gates::numbers_of_gates_and_spans_that_make_no_sense_are_refused", || {
        let context = context();
        for count in [0, 1 << 20] {
            assert!(Gates::new(&context, count).unwrap_err().to_string().contains("gates"));
        }
        let gates = Gates::new(&context, 2).unwrap();
        assert!(gates.gate(1).is_some() && gates.gate(2).is_none());
        let (short, long) = (host(&[0; 8]), host(&[0; 16]));
        assert!(Span::new(&short, 0..9).is_err() && Span::new(&short, 5..usize::MAX).is_err());
        let stream = Stream::new(&context).unwrap();
        let error = stream.copy(&whole(&long), &whole(&short)).unwrap_err();
        assert!(error.to_string().contains("16 bytes to 8"), "{error}");
        assert!(stream.is_idle().unwrap());
    });
}
