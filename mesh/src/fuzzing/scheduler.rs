//! What members say to the scheduler, in any order.

use super::Input;
use crate::scheduler::{Action, SchedulerOptions, SequenceId, Session, State};
use prost::Message;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use stepmesh_proto::control::{FromMember, GenerateRequest, sequence_event, to_member::Body};

/// The deployment's members, from the scheduler's side.
struct Members {
    state: State,
    sessions: Vec<Session>,
    sequences: Vec<SequenceId>,
    ended: BTreeSet<Session>,
    finished: BTreeSet<SequenceId>,
    welcomed: bool,
}

impl Members {
    /// Takes the state's actions, which must make sense.
    fn act(&mut self) {
        while let Some(action) = self.state.next_action() {
            match action {
                Action::Send { session, message } => {
                    assert!(!self.ended.contains(&session), "{session:?} is told something after its end");
                    let bytes = message.encode_to_vec();
                    assert!(bytes.len() < 16 << 20, "a message that nobody takes");
                    self.welcomed |= matches!(message.body, Some(Body::Welcome(_)));
                }
                Action::End { session, .. } => assert!(self.ended.insert(session), "{session:?} ended twice"),
                Action::Deliver { sequence, event } => {
                    assert!(!self.finished.contains(&sequence), "{sequence:?} goes on after its end");
                    if matches!(event, sequence_event::Body::Finished(_) | sequence_event::Body::Failed(_)) {
                        self.finished.insert(sequence);
                    }
                }
                Action::Answer { .. } => {}
                Action::Note(event) => assert!(!event.to_string().is_empty()),
            }
        }
    }
}

/// A script of sessions that open, speak (protobuf), fall silent and end. Taken if somebody was admitted.
pub fn scheduler(bytes: &[u8]) -> bool {
    let secrets = Box::new(|| Ok([3; 16]));
    let Ok(state) = State::new(SchedulerOptions::new(2, 2), secrets) else { return false };
    let mut now = Instant::now();
    let mut members = Members {
        state,
        sessions: Vec::new(),
        sequences: Vec::new(),
        ended: BTreeSet::new(),
        finished: BTreeSet::new(),
        welcomed: false,
    };
    let mut input = Input(bytes);
    while let Some(step) = input.step() {
        let session = |number: u8| members.sessions.get(usize::from(number) % members.sessions.len().max(1)).copied();
        match step % 10 {
            0 => {
                let session = members.state.connected(now);
                members.sessions.push(session);
            }
            1..=4 => {
                let (session, said) = (session(input.byte()), FromMember::decode(input.chunk()));
                if let (Some(session), Ok(said)) = (session, said) {
                    members.state.message(session, said, now);
                }
            }
            5 => {
                if let Some(session) = session(input.byte()).filter(|session| members.ended.insert(*session)) {
                    members.state.disconnected(session, "its process died");
                }
            }
            6 => {
                now += Duration::from_millis(u16::from_le_bytes(input.take()).into());
                members.state.tick(now);
            }
            7 => {
                let attention_rank = Some(u32::from(input.byte())).filter(|&rank| rank < 4);
                let request = GenerateRequest { prompt: vec![1], attention_rank, ..Default::default() };
                members.sequences.extend(members.state.generate(request));
            }
            8 => {
                let at = usize::from(input.byte());
                if let Some(&sequence) = members.sequences.get(at) {
                    members.state.cancel(sequence);
                }
            }
            _ if input.byte() == 0 => members.state.drain(),
            _ => drop(members.state.stats(true, now)),
        }
        members.act();
        let status = members.state.status();
        assert!(status.members.len() <= 4, "{status:?}");
        assert!(!status.complete || status.members.len() == 4, "{status:?}");
    }
    members.welcomed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz_inputs::check;
    use stepmesh_proto::WIRE_VERSION;
    use stepmesh_proto::control::{
        BarrierEnter, CONTROL_VERSION, Hello, LinkDown, LinkGrants, LinkOffer, LinkUp, Role, SequenceEvent, Token,
        from_member::Body as Said,
    };

    fn say(session: u8, body: Said) -> Vec<u8> {
        let bytes = FromMember { body: Some(body) }.encode_to_vec();
        [&[1, session][..], &(bytes.len() as u16).to_le_bytes(), &bytes].concat()
    }

    fn hello(role: Role) -> Said {
        Said::Hello(Hello {
            control_version: CONTROL_VERSION,
            wire_version: WIRE_VERSION.into(),
            role: role.into(),
            name: "host".into(),
            transport: "mem".into(),
            lanes: 1,
            layout: "tiny".into(),
            workload: "tiny".into(),
            pid: 42,
            ..Default::default()
        })
    }

    #[test]
    fn members_that_say_anything() {
        let roles = [Role::Attention, Role::Attention, Role::Ffn, Role::Ffn];
        let joined: Vec<u8> =
            (0..).zip(roles).flat_map(|(session, role)| [vec![0], say(session, hello(role))].concat()).collect();
        // Every pair, by ascending incarnation.
        let pairs = [(0, 2), (1, 2), (0, 3), (1, 3)];
        let up: Vec<u8> = (1..)
            .zip(pairs)
            .flat_map(|(incarnation, (attention, ffn))| {
                let up = || Said::LinkUp(LinkUp { incarnation });
                let offer = Said::LinkOffer(LinkOffer { incarnation, descriptor: vec![1; 20] });
                let grants = Said::LinkGrants(LinkGrants { incarnation, descriptors: vec![vec![2; 20]; 2] });
                [say(attention, offer), say(ffn, grants), say(attention, up()), say(ffn, up())].concat()
            })
            .collect();
        let token = Said::SequenceEvent(SequenceEvent {
            sequence: 1,
            body: Some(sequence_event::Body::Token(Token { token: 5, ..Default::default() })),
        });
        let work = [vec![7, 0], say(0, token), vec![9, 1], vec![8, 0]].concat();
        let barrier = Said::BarrierEnter(BarrierEnter { name: "x".into(), group: 0 });
        let down = Said::LinkDown(LinkDown { incarnation: 1, reason: "lane 0".into() });
        let end = [say(1, barrier), say(2, down), vec![6, 0, 2], vec![5, 0], say(3, Said::Leave(Default::default()))];
        let complete = [joined.clone(), up].concat();
        check("scheduler", &[joined, [complete.clone(), work].concat(), [complete, end.concat()].concat()], scheduler);
    }
}
