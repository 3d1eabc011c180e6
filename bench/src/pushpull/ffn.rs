//! The FFN side: answers whatever comes until the other side is over.

use super::ends::FfnEnd;
use super::payload::{Ask, Payload, Tensors, echoed};
use crate::BenchError;
use crate::timing::Times;
use crate::transport::Mode;
use std::time::{Duration, Instant};
use stepmesh_mesh::{Batch, Segment};

/// How long a wait may keep the thread from seeing that it is over.
const LOOK: Duration = Duration::from_millis(20);

/// Answers at once or after `compute`; the times of the responses that were to be timed.
pub(super) fn serve<F: FfnEnd>(
    members: &mut [F],
    payload: &Payload,
    compute: Duration,
    over: impl Fn() -> bool,
) -> Result<Times, BenchError> {
    let result = Tensors::new(payload.reply(), 2);
    let mut responses = Times::new()?;
    // With several members nobody can wait for one.
    let patience = if members.len() == 1 { LOOK } else { Duration::ZERO };
    while !over() {
        for member in &mut *members {
            let Some(mut batch) = member.next_batch(patience)? else {
                member.forget_events();
                continue;
            };
            let start = (!compute.is_zero()).then(Instant::now);
            let is_timed = answer(&mut batch, payload, &result)?;
            while start.is_some_and(|start| start.elapsed() < compute) {
                std::hint::spin_loop();
            }
            let before = is_timed.then(Instant::now);
            member.respond(batch)?;
            if let Some(before) = before {
                responses.record(before.elapsed(), 1);
            }
        }
    }
    Ok(responses)
}

/// Fills every segment's reply as it was asked to; whether the response is to be timed.
fn answer(batch: &mut Batch, payload: &Payload, result: &Tensors) -> Result<bool, BenchError> {
    let mut is_timed = false;
    for segment in &mut batch.segments {
        let ask = Ask::decode(segment.app());
        match ask {
            Ask::Reply(Mode::Copy) | Ask::Timed(Mode::Copy) => result.copy_to(0, segment.reply_mut(0)),
            Ask::Echo => echo(segment),
            Ask::Reply(Mode::InPlace) | Ask::Timed(Mode::InPlace) => {}
        }
        is_timed |= matches!(ask, Ask::Timed(_));
        segment.set_reply(payload.reply())?;
    }
    Ok(is_timed)
}

fn echo(segment: &mut Segment) {
    let (input, output) = segment.split(0, 0);
    output.iter_mut().zip(input.iter().cycle()).for_each(|(output, &input)| *output = echoed(input));
}
