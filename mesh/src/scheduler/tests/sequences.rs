//! Sequences and figures.

use super::world::World;
use crate::scheduler::{GenerateRefusal, SchedulerOptions, SequenceId, Session};
use std::time::Duration;
use stepmesh_proto::control::{
    Failed, Finished, GenerateRequest, MemberStats, Role, SequenceEvent, Token, failed, from_member::Body as Said,
    sequence_event::Body as Progress, to_member::Body,
};

fn prompt() -> GenerateRequest {
    GenerateRequest { prompt: vec![1, 2, 3], max_new_tokens: 4, ..Default::default() }
}

impl World {
    fn start(&mut self, request: GenerateRequest) -> Result<SequenceId, GenerateRefusal> {
        let started = self.state.generate(request);
        self.act();
        started
    }

    fn report(&mut self, session: Session, sequence: SequenceId, body: Progress) {
        self.say(session, Said::SequenceEvent(SequenceEvent { sequence: sequence.number(), body: Some(body) }));
    }

    fn started(&self, session: Session) -> usize {
        self.inbox(session).iter().filter(|body| matches!(body, Body::StartSequence(_))).count()
    }
}

fn token(token: u32) -> Progress {
    Progress::Token(Token { token, ..Default::default() })
}

#[test]
fn an_incomplete_deployment_starts_nothing_and_says_what_is_missing() {
    let mut world = World::new(2, 1);
    world.join(Role::Attention);
    world.join(Role::Ffn);
    let refusal = world.start(prompt()).unwrap_err();
    assert!(matches!(refusal, GenerateRefusal::NotReady { attention: 1, ffn: 1, links: 0, links_expected: 2, .. }));
    assert!(refusal.to_string().contains("1 of 2 attention and 1 of 1 FFN"), "{refusal}");
}

#[test]
fn prompts_go_to_the_least_loaded_instance_or_the_one_asked_for() {
    let (mut world, attention, _) = World::complete(3, 1);
    world.start(GenerateRequest { attention_rank: Some(1), ..prompt() }).unwrap();
    let first = world.start(prompt()).unwrap();
    world.start(prompt()).unwrap();
    assert_eq!([0, 1, 2].map(|rank| world.started(attention[rank])), [1, 1, 1]);
    world.start(prompt()).unwrap();
    assert_eq!(world.started(attention[0]), 2, "the lowest rank among equals");
    world.report(attention[0], first, Progress::Finished(Finished::default()));
    world.start(GenerateRequest { attention_rank: Some(0), ..prompt() }).unwrap();
    assert_eq!(world.state.status().members.iter().map(|member| member.sequences).collect::<Vec<_>>(), [2, 1, 1, 0]);
}

#[test]
fn requests_that_cannot_be_met_are_refused() {
    let (mut world, ..) = World::complete(1, 1);
    let far = world.start(GenerateRequest { attention_rank: Some(1), ..prompt() }).unwrap_err();
    assert!(far.to_string().contains("attention rank 1 is out of range"));
    assert!(matches!(world.start(GenerateRequest::default()), Err(GenerateRefusal::Invalid(_))));
    world.state.drain();
    assert_eq!(world.start(prompt()), Err(GenerateRefusal::Draining));
}

#[test]
fn sequences_are_limited() {
    let mut world = World::with(SchedulerOptions { max_sequences: 1, ..SchedulerOptions::new(1, 1) });
    let attention = world.join(Role::Attention);
    world.join(Role::Ffn);
    world.all_links_up();
    let sequence = world.start(prompt()).unwrap();
    assert_eq!(world.start(prompt()), Err(GenerateRefusal::Overloaded(1)));
    world.report(attention, sequence, Progress::Finished(Finished::default()));
    world.start(prompt()).unwrap();
}

#[test]
fn events_arrive_in_order_and_end_with_the_last() {
    let (mut world, attention, _) = World::complete(1, 1);
    let sequence = world.start(prompt()).unwrap();
    let finished = Progress::Finished(Finished { reason: 1, tokens: 2 });
    for event in [token(5), token(6), finished.clone(), token(7)] {
        world.report(attention[0], sequence, event);
    }
    assert_eq!(world.progress, [(sequence, token(5)), (sequence, token(6)), (sequence, finished)]);
    assert!(world.ended.is_empty());
}

#[test]
fn a_client_that_is_gone_cancels_its_sequence() {
    let (mut world, attention, _) = World::complete(1, 1);
    let sequence = world.start(prompt()).unwrap();
    world.state.cancel(sequence);
    world.state.cancel(sequence);
    world.act();
    let cancels = world.inbox(attention[0]).iter().filter(|body| matches!(body, Body::CancelSequence(_))).count();
    assert_eq!(cancels, 1);
    let failed = Failed { kind: failed::Kind::Cancelled.into(), message: "cancelled".to_owned() };
    world.report(attention[0], sequence, Progress::Failed(failed));
    assert!(world.progress.is_empty() && world.ended.is_empty(), "its last words are nobody's");
}

#[test]
fn a_lost_attention_member_fails_its_sequences_by_name_and_no_others() {
    let (mut world, attention, _) = World::complete(2, 1);
    let lost = world.start(prompt()).unwrap();
    let kept = world.start(prompt()).unwrap();
    world.disconnect(attention[0]);
    let [(sequence, Progress::Failed(failed))] = world.progress.as_slice() else { panic!("{:?}", world.progress) };
    assert_eq!((*sequence, failed.kind()), (lost, failed::Kind::PeerLost));
    assert_eq!(failed.message, "attention rank 0 (host, pid 42) was lost: its process died");
    world.report(attention[1], kept, token(1));
    assert_eq!(world.progress.len(), 2);
}

#[test]
fn figures_are_gathered_from_all_attention_instances() {
    let (mut world, attention, ffn) = World::complete(2, 1);
    let question = world.state.stats(true, world.now);
    world.act();
    let Body::ReportStats(ask) = world.inbox(attention[0])[0] else { panic!() };
    assert!(ask.reset && world.inbox(ffn[0]).is_empty());
    for member in [attention[1], attention[0], attention[0]] {
        let stats = MemberStats { request: ask.request, tokens: member.number(), ..Default::default() };
        world.say(member, Said::Stats(stats));
    }
    let [(answered, reply)] = world.answers.as_slice() else { panic!() };
    assert_eq!(*answered, question);
    let figures: Vec<_> = reply.members.iter().map(|stats| (stats.attention_rank, stats.tokens)).collect();
    assert_eq!(figures, [(0, attention[0].number()), (1, attention[1].number())]);
}

#[test]
fn figures_do_not_wait_for_the_silent_or_the_lost() {
    let (mut world, attention, ffn) = World::complete(2, 1);
    world.state.stats(false, world.now);
    world.pass(Duration::from_secs(3), &[attention[0], attention[1], ffn[0]]);
    assert_eq!(world.answers.len(), 1);
    world.state.stats(false, world.now);
    world.disconnect(attention[0]);
    assert_eq!(world.answers.len(), 1);
    world.disconnect(attention[1]);
    assert_eq!(world.answers.len(), 2);
    world.state.stats(false, world.now);
    world.act();
    assert_eq!(world.answers.len(), 3, "nobody to wait for");
}
