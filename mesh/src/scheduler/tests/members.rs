//! Joining, leaving, losing; barriers.

use super::world::{World, hello};
use crate::scheduler::{OptionsError, SchedulerOptions, State, system_secrets};
use std::time::Duration;
use stepmesh_proto::control::{BarrierGroup, Hello, Leave, Role, from_member::Body as Said, to_member::Body};

#[test]
fn options_that_make_no_sense_are_refused() {
    let refused = |options| State::new(options, system_secrets()).unwrap_err();
    assert!(matches!(refused(SchedulerOptions::new(0, 1)), OptionsError::EmptySide { .. }));
    let hasty = SchedulerOptions { loss: Duration::from_millis(1), ..SchedulerOptions::new(1, 1) };
    assert!(matches!(refused(hasty), OptionsError::Heartbeat { .. }));
}

#[test]
fn a_member_is_welcomed_with_its_rank_and_the_deployment_shape() {
    let mut world = World::new(2, 3);
    let member = world.join(Role::Ffn);
    let Body::Welcome(welcome) = &world.inbox(member)[0] else { panic!() };
    assert_eq!((welcome.member, welcome.rank, welcome.epoch), (member.number(), 0, 1));
    assert_eq!((welcome.attention, welcome.ffn, welcome.heartbeat_ms, welcome.loss_ms), (2, 3, 1000, 3000));
    let epoch = &world.epochs(member)[0];
    assert_eq!((epoch.epoch, epoch.complete, &epoch.ffn_ranks), (1, false, &vec![0]));
}

#[test]
fn ranks_are_the_lowest_free_or_those_asked_for() {
    let mut world = World::new(3, 1);
    let asked = world.greet(Hello { rank: Some(1), ..hello(Role::Attention) });
    let (first, last) = (world.join(Role::Attention), world.join(Role::Attention));
    assert_eq!([asked, first, last].map(|session| world.rank(session)), [1, 0, 2]);
}

#[test]
fn a_hello_that_does_not_fit_is_refused_with_the_field_and_both_values() {
    let fits = hello(Role::Attention);
    let cases = [
        (Hello { control_version: 77, ..fits.clone() }, ["version 2 of the control protocol", "77"]),
        (Hello { wire_version: 78, ..fits.clone() }, ["version 1 of the wire protocol", "78"]),
        (Hello { role: 0, ..fits.clone() }, ["attention", "FFN"]),
        (Hello { role: 9, ..fits.clone() }, ["attention", "FFN"]),
        (Hello { transport: "tcp".into(), ..fits.clone() }, ["transport differs", "`mem`, this member has `tcp`"]),
        (Hello { lanes: 3, ..fits.clone() }, ["lanes differs", "`2`, this member has `3`"]),
        (Hello { layout: "4".into(), ..fits.clone() }, ["layout differs", "this member has `4`"]),
        (Hello { workload: "big".into(), ..fits.clone() }, ["workload differs", "`tiny bf16`, this member has `big`"]),
        (Hello { rank: Some(2), ..fits.clone() }, ["rank 2 is out of range", "ranks 0 to 1"]),
        (Hello { rank: Some(u32::MAX), ..fits.clone() }, ["out of range", "2 attention instances"]),
        (Hello { rank: Some(0), ..fits.clone() }, ["taken by attention rank 0", "host, pid 42"]),
        (Hello { name: "x".repeat(5000), ..fits.clone() }, ["name has 5000 bytes", "4096"]),
    ];
    let mut world = World::new(2, 1);
    let member = world.join(Role::Attention);
    for (hello, words) in cases {
        let session = world.greet(hello);
        let refusal = world.refusal(session);
        assert!(words.iter().all(|word| refusal.contains(word)), "{refusal}");
    }
    assert_eq!(world.state.status().members.len(), 1);
    assert_eq!(world.epochs(member).len(), 1, "nobody else notices");
}

#[test]
fn a_full_side_refuses_and_names_the_limit() {
    let mut world = World::new(1, 1);
    world.join(Role::Ffn);
    let second = world.greet(hello(Role::Ffn));
    assert_eq!(world.refusal(second), "all 1 FFN ranks are taken");
}

#[test]
fn a_session_that_does_not_begin_with_hello_or_says_it_twice_is_ended() {
    let mut world = World::new(1, 1);
    let hasty = world.connect();
    world.say(hasty, Said::Heartbeat(Default::default()));
    assert!(world.refusal(hasty).contains("first message must be a Hello"));
    let double = world.greet(hello(Role::Ffn));
    world.say(double, Said::Hello(hello(Role::Ffn)));
    assert!(world.refusal(double).contains("second Hello"));
    assert!(world.state.status().members.is_empty());
}

#[test]
fn a_session_that_never_says_hello_is_ended() {
    let mut world = World::new(1, 1);
    let mute = world.connect();
    world.pass(Duration::from_secs(4), &[]);
    assert!(world.refusal(mute).contains("nothing was heard"));
    assert!(world.state.is_deserted());
}

#[test]
fn a_lost_member_is_named_to_everybody_and_its_rank_is_free_again() {
    let (mut world, attention, ffn) = World::complete(2, 1);
    world.disconnect(attention[1]);
    for survivor in [attention[0], ffn[0]] {
        let Body::PeerLost(lost) = &world.inbox(survivor)[0] else { panic!("{:?}", world.inbox(survivor)) };
        let peer = lost.peer.as_ref().unwrap();
        assert_eq!((peer.role(), peer.rank, peer.pid, lost.epoch), (Role::Attention, 1, 42, 4));
        assert_eq!(lost.reason, "its process died");
        let epoch = world.epochs(survivor).pop().unwrap();
        assert_eq!((epoch.epoch, epoch.complete, epoch.attention_ranks), (4, false, vec![0]));
    }
    let replacement = world.join(Role::Attention);
    assert_eq!(world.rank(replacement), 1);
    assert_ne!(replacement, attention[1]);
    world.all_links_up();
    assert!(world.epochs(ffn[0]).pop().unwrap().complete);
}

#[test]
fn silence_is_loss_and_any_message_breaks_it() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    world.pass(Duration::from_secs(10), &[attention[0], ffn[0]]);
    assert!(world.state.status().complete);
    world.pass(Duration::from_millis(3100), &[attention[0]]);
    assert!(world.refusal(ffn[0]).contains("nothing was heard of it for 3s"));
    assert!(world.inbox(attention[0]).iter().any(|body| matches!(body, Body::PeerLost(_))));
}

#[test]
fn a_good_bye_is_no_loss_but_frees_the_rank_all_the_same() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    world.say(ffn[0], Said::Leave(Leave { reason: "upgrade".to_owned() }));
    assert_eq!(world.ended[&ffn[0]], "upgrade");
    let Body::PeerLost(lost) = &world.inbox(attention[0])[0] else { panic!() };
    assert_eq!(lost.reason, "upgrade");
    assert!(world.notes.iter().any(|note| note.to_string().contains("left: upgrade")));
    assert!(!world.notes[0].is_warning());
    world.join(Role::Ffn);
}

#[test]
fn when_the_last_member_is_gone_the_terms_are_open_again() {
    let mut world = World::new(1, 1);
    let first = world.join(Role::Ffn);
    world.disconnect(first);
    let other = world.greet(Hello { workload: "big".into(), ..hello(Role::Ffn) });
    assert_eq!(world.rank(other), 0);
    assert_eq!(world.state.status().workload, "big");
}

#[test]
fn an_idle_scheduler_sleeps_between_the_losses_it_watches_for() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    let mut ticks = 0;
    for _ in 0..10_000 {
        world.now += Duration::from_millis(1);
        if world.state.next_tick().unwrap() <= world.now {
            world.state.tick(world.now);
            ticks += 1;
        }
        for session in [attention[0], ffn[0]] {
            world.say(session, Said::Heartbeat(Default::default()));
        }
    }
    assert!(ticks <= 4, "{ticks} ticks in ten seconds");
}

#[test]
fn draining_asks_everybody_to_leave_and_admits_nobody() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    world.state.drain();
    world.act();
    assert!([attention[0], ffn[0]].iter().all(|member| matches!(world.inbox(*member), [Body::Drain(_)])));
    let late = world.greet(hello(Role::Ffn));
    assert!(world.refusal(late).contains("shutting down"));
    for member in [attention[0], ffn[0]] {
        world.say(member, Said::Leave(Leave { reason: "drained".to_owned() }));
    }
    assert!(world.state.is_deserted());
}

#[test]
fn a_barrier_opens_when_the_last_of_its_group_has_entered() {
    let (mut world, attention, ffn) = World::complete(2, 1);
    world.enter(attention[0], "start", BarrierGroup::Attention);
    world.enter(attention[0], "start", BarrierGroup::Attention);
    world.enter(attention[0], "start", BarrierGroup::All);
    world.enter(ffn[0], "start", BarrierGroup::All);
    assert!(world.released(attention[0]).is_empty(), "entering twice counts once");
    world.enter(attention[1], "start", BarrierGroup::Attention);
    assert_eq!(world.released(attention[0]), [("start".to_owned(), String::new())]);
    assert!(world.released(ffn[0]).is_empty());
    world.enter(attention[1], "start", BarrierGroup::All);
    assert_eq!(world.released(attention[0]).len(), 2);
    assert_eq!(world.released(ffn[0]).len(), 1);
    world.enter(ffn[0], "start", BarrierGroup::All);
    assert_eq!(world.released(ffn[0]).len(), 1, "a barrier can be met again");
}

#[test]
fn a_barrier_waits_for_ranks_that_have_not_joined_yet() {
    let mut world = World::new(1, 1);
    let first = world.join(Role::Attention);
    world.enter(first, "start", BarrierGroup::All);
    assert!(world.released(first).is_empty());
    let second = world.join(Role::Ffn);
    world.enter(second, "start", BarrierGroup::All);
    assert_eq!(world.released(first).len(), 1);
}

#[test]
fn a_barrier_that_waits_for_a_lost_member_breaks_and_says_why() {
    let (mut world, attention, ffn) = World::complete(2, 1);
    world.enter(attention[0], "start", BarrierGroup::All);
    world.enter(attention[0], "side", BarrierGroup::Attention);
    world.disconnect(ffn[0]);
    let sentence = "FFN rank 0 (host, pid 42) was lost: its process died";
    assert_eq!(world.released(attention[0]), [("start".to_owned(), sentence.to_owned())]);
    world.enter(attention[1], "side", BarrierGroup::Attention);
    assert_eq!(world.released(attention[1]), [("side".to_owned(), String::new())]);
}
