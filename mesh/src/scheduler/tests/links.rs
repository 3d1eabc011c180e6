//! Links: introduced, relayed, up, fenced, opened anew.

use super::world::World;
use crate::scheduler::{SchedulerOptions, State};
use std::time::Duration;
use stepmesh_proto::control::{LinkGrants, LinkOffer, Role, from_member::Body as Said, to_member::Body};

#[test]
fn every_pair_across_the_sides_is_introduced_once_with_one_secret() {
    let mut world = World::new(2, 2);
    let attention = [world.join(Role::Attention), world.join(Role::Attention)];
    let ffn = [world.join(Role::Ffn), world.join(Role::Ffn)];
    let mut incarnations = Vec::new();
    for member in attention {
        for open in world.opened(member) {
            let peer = open.peer.clone().unwrap();
            let end = ffn.into_iter().find(|end| end.number() == peer.member).unwrap();
            let other = world.opened(end).into_iter().find(|other| other.incarnation == open.incarnation).unwrap();
            assert_eq!((other.secret, open.secret.len()), (open.secret, 16));
            assert_eq!(other.peer.unwrap().member, member.number());
            incarnations.push(open.incarnation);
        }
    }
    incarnations.sort_unstable();
    assert_eq!(incarnations, [1, 2, 3, 4]);
}

#[test]
fn offers_and_grants_reach_the_other_end_only() {
    let (mut world, attention, ffn) = World::complete(2, 1);
    let (incarnation, pair) = world.state.live_links()[0];
    assert_eq!(pair, [attention[0], ffn[0]]);
    let offer = LinkOffer { incarnation, descriptor: vec![1; 4096] };
    let grants = LinkGrants { incarnation, descriptors: vec![vec![2; 4096]; 64] };
    world.say(attention[0], Said::LinkOffer(offer.clone()));
    world.say(ffn[0], Said::LinkGrants(grants.clone()));
    assert_eq!(world.inbox(ffn[0]), [Body::LinkOffer(offer)]);
    assert_eq!(world.inbox(attention[0]), [Body::LinkGrants(grants)]);
    assert!(world.inbox(attention[1]).is_empty());
}

#[test]
fn the_deployment_is_complete_when_all_ranks_are_held_and_all_links_up() {
    let mut world = World::new(2, 1);
    let members = [world.join(Role::Attention), world.join(Role::Ffn)];
    world.all_links_up();
    assert!(!world.state.status().complete, "a rank is free");
    let last = world.join(Role::Attention);
    let (incarnation, pair) = *world.state.live_links().last().unwrap();
    world.up(pair[0], incarnation);
    world.up(pair[0], incarnation);
    assert!(!world.state.status().complete, "one end says nothing about the other");
    world.up(pair[1], incarnation);
    for member in [members[0], members[1], last] {
        let epoch = world.epochs(member).pop().unwrap();
        assert_eq!((epoch.epoch, epoch.complete), (3, true));
    }
    let status = world.state.status();
    assert_eq!(status.members.iter().map(|member| member.links_up).collect::<Vec<_>>(), [1, 1, 2]);
}

#[test]
fn a_fenced_end_has_the_other_fenced_and_then_the_link_opens_anew() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    world.down(attention[0], 1);
    assert!(!world.epochs(ffn[0]).pop().unwrap().complete);
    let Body::CloseLink(close) = &world.inbox(ffn[0])[0] else { panic!() };
    assert_eq!((close.incarnation, close.reason.as_str()), (1, "lane 1 failed"));
    world.pass(Duration::from_secs(10), &[attention[0], ffn[0]]);
    assert!(world.opened(attention[0]).is_empty(), "not before both ends are fenced");
    world.down(ffn[0], 1);
    world.pass(Duration::from_secs(1), &[attention[0], ffn[0]]);
    let opened = world.opened(attention[0]);
    assert_eq!(opened.iter().map(|open| open.incarnation).collect::<Vec<_>>(), [2]);
    assert_eq!(world.opened(ffn[0])[0].secret, opened[0].secret);
    world.all_links_up();
    assert!(world.state.status().complete);
}

#[test]
fn a_link_that_keeps_failing_is_opened_ever_more_rarely() {
    let mut world = World::new(1, 1);
    let members = [world.join(Role::Attention), world.join(Role::Ffn)];
    let mut opened = Vec::new();
    for _ in 0..6000 {
        for (incarnation, pair) in world.state.live_links() {
            opened.push(world.now);
            pair.into_iter().for_each(|end| world.down(end, incarnation));
        }
        world.pass(Duration::from_millis(10), &members);
    }
    let gaps: Vec<_> = opened.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!((10..30).contains(&opened.len()), "{} openings in a minute", opened.len());
    assert!(gaps.windows(2).all(|pair| pair[0] <= pair[1] + Duration::from_millis(10)), "{gaps:?}");
    assert!(gaps[0] < Duration::from_millis(100) && *gaps.last().unwrap() >= Duration::from_secs(5), "{gaps:?}");
}

#[test]
fn a_link_that_was_up_for_long_is_opened_again_at_once() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    let members = [attention[0], ffn[0]];
    for round in 1..5 {
        world.pass(Duration::from_secs(11), &members);
        members.into_iter().for_each(|end| world.down(end, round));
        world.pass(Duration::from_millis(100), &members);
        assert_eq!(world.state.live_links()[0].0, round + 1);
        world.all_links_up();
    }
}

#[test]
fn a_link_that_does_not_come_up_is_closed_on_both_ends() {
    let mut world = World::new(1, 1);
    let members = [world.join(Role::Attention), world.join(Role::Ffn)];
    world.up(members[0], 1);
    world.pass(Duration::from_secs(61), &members);
    for member in members {
        let Some(Body::CloseLink(close)) = world.inbox(member).last() else { panic!() };
        assert!(close.reason.contains("not up within 60s"));
    }
    members.into_iter().for_each(|end| world.down(end, 1));
    world.pass(Duration::from_secs(1), &members);
    assert_eq!(world.state.live_links()[0].0, 2);
}

#[test]
fn a_member_that_does_not_fence_in_time_is_lost() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    world.down(attention[0], 1);
    world.pass(Duration::from_secs(61), &[attention[0], ffn[0]]);
    assert!(world.refusal(ffn[0]).contains("did not fence its end of link 1 within 60s"));
    assert_eq!(world.state.status().members.len(), 1);
}

#[test]
fn a_lost_member_takes_its_links_along_and_late_words_about_them_are_dropped() {
    let (mut world, attention, ffn) = World::complete(2, 1);
    world.disconnect(attention[0]);
    world.forget();
    let offer = LinkOffer { incarnation: 1, descriptor: vec![1] };
    world.say(ffn[0], Said::LinkOffer(offer));
    world.up(ffn[0], 1);
    world.down(ffn[0], 1);
    assert!(world.inbox(ffn[0]).is_empty() && world.inbox(attention[1]).is_empty());
    assert!(world.ended.is_empty());
    let replacement = world.join(Role::Attention);
    assert_eq!(world.opened(replacement)[0].incarnation, 3, "an incarnation is never used again");
}

#[test]
fn words_over_a_link_that_is_being_fenced_are_not_passed_on() {
    let (mut world, attention, ffn) = World::complete(1, 1);
    world.down(attention[0], 1);
    world.forget();
    world.say(ffn[0], Said::LinkOffer(LinkOffer { incarnation: 1, descriptor: vec![1] }));
    assert!(world.inbox(attention[0]).is_empty() && world.ended.is_empty());
}

#[test]
fn without_random_bytes_a_link_waits_and_is_tried_again() {
    let mut world = World::new(1, 1);
    let mut draws = 0;
    let secrets = Box::new(move || {
        draws += 1;
        if draws > 2 { Ok([7; 16]) } else { Err("no entropy".to_owned()) }
    });
    world.state = State::new(SchedulerOptions::new(1, 1), secrets).unwrap();
    let members = [world.join(Role::Attention), world.join(Role::Ffn)];
    assert!(world.opened(members[0]).is_empty());
    assert!(world.notes.iter().any(|note| note.to_string().contains("no entropy")));
    world.pass(Duration::from_secs(1), &members);
    assert_eq!(world.opened(members[0]).len(), 1);
}
