//! A state with a clock that is moved by hand, and the messages that its members got.

use crate::scheduler::{Action, Event, SchedulerOptions, SequenceId, Session, State, StatsId};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use stepmesh_proto::WIRE_VERSION;
use stepmesh_proto::control::{
    BarrierEnter, BarrierGroup, CONTROL_VERSION, Epoch, FromMember, Hello, LinkDown, LinkUp, OpenLink, Role,
    StatsReply, from_member::Body as Said, sequence_event::Body as Progress, to_member::Body,
};

pub(super) struct World {
    pub(super) state: State,
    pub(super) now: Instant,
    pub(super) inboxes: BTreeMap<Session, Vec<Body>>,
    pub(super) ended: BTreeMap<Session, String>,
    pub(super) progress: Vec<(SequenceId, Progress)>,
    pub(super) answers: Vec<(StatsId, StatsReply)>,
    pub(super) notes: Vec<Event>,
}

pub(super) fn hello(role: Role) -> Hello {
    Hello {
        control_version: CONTROL_VERSION,
        wire_version: WIRE_VERSION.into(),
        role: role.into(),
        rank: None,
        name: "host".to_owned(),
        transport: "mem".to_owned(),
        lanes: 2,
        layout: "3 microbatches of 8 rows".to_owned(),
        workload: "tiny bf16".to_owned(),
        pid: 42,
    }
}

impl World {
    pub(super) fn new(attention: u32, ffn: u32) -> Self {
        Self::with(SchedulerOptions::new(attention, ffn))
    }

    pub(super) fn with(options: SchedulerOptions) -> Self {
        let mut drawn = 0_u8;
        let secrets = Box::new(move || {
            drawn = drawn.wrapping_add(1);
            Ok([drawn; 16])
        });
        Self {
            state: State::new(options, secrets).unwrap(),
            now: Instant::now(),
            inboxes: BTreeMap::new(),
            ended: BTreeMap::new(),
            progress: Vec::new(),
            answers: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// A deployment whose members have all joined and whose links are all up.
    pub(super) fn complete(attention: u32, ffn: u32) -> (Self, Vec<Session>, Vec<Session>) {
        let mut world = Self::new(attention, ffn);
        let attention = (0..attention).map(|_| world.join(Role::Attention)).collect();
        let ffn = (0..ffn).map(|_| world.join(Role::Ffn)).collect();
        world.all_links_up();
        assert!(world.state.status().complete);
        world.forget();
        (world, attention, ffn)
    }

    pub(super) fn act(&mut self) {
        while let Some(action) = self.state.next_action() {
            match action {
                Action::Send { session, message } => {
                    assert!(!self.ended.contains_key(&session), "{session:?} is told something after its end");
                    self.inboxes.entry(session).or_default().push(message.body.unwrap());
                }
                Action::End { session, reason } => {
                    assert!(self.ended.insert(session, reason).is_none(), "{session:?} ended twice");
                }
                Action::Deliver { sequence, event } => self.progress.push((sequence, event)),
                Action::Answer { request, reply } => self.answers.push((request, reply)),
                Action::Note(event) => {
                    assert!(!event.to_string().is_empty());
                    self.notes.push(event);
                }
            }
        }
    }

    /// What members have been told so far is of no interest.
    pub(super) fn forget(&mut self) {
        self.inboxes.clear();
        self.progress.clear();
        self.notes.clear();
    }

    pub(super) fn connect(&mut self) -> Session {
        self.state.connected(self.now)
    }

    pub(super) fn say(&mut self, session: Session, body: Said) {
        self.state.message(session, FromMember { body: Some(body) }, self.now);
        self.act();
    }

    pub(super) fn greet(&mut self, hello: Hello) -> Session {
        let session = self.connect();
        self.say(session, Said::Hello(hello));
        session
    }

    pub(super) fn join(&mut self, role: Role) -> Session {
        let session = self.greet(hello(role));
        assert!(matches!(self.inbox(session)[0], Body::Welcome(_)), "{:?}", self.inbox(session));
        session
    }

    pub(super) fn disconnect(&mut self, session: Session) {
        self.state.disconnected(session, "its process died");
        self.act();
    }

    /// Time passes, with a heartbeat of everybody in `living`.
    pub(super) fn pass(&mut self, time: Duration, living: &[Session]) {
        let end = self.now + time;
        while self.now < end {
            self.now = end.min(self.now + Duration::from_millis(10));
            for session in living {
                self.say(*session, Said::Heartbeat(Default::default()));
            }
            self.state.tick(self.now);
            self.act();
        }
    }

    pub(super) fn inbox(&self, session: Session) -> &[Body] {
        self.inboxes.get(&session).map_or(&[], Vec::as_slice)
    }

    pub(super) fn rank(&self, session: Session) -> u32 {
        self.inbox(session)
            .iter()
            .find_map(|body| if let Body::Welcome(welcome) = body { Some(welcome.rank) } else { None })
            .unwrap()
    }

    /// Why the session was refused.
    pub(super) fn refusal(&self, session: Session) -> &str {
        let Some(Body::Refused(refused)) = self.inbox(session).last() else {
            panic!("{session:?} was not refused: {:?}", self.inbox(session));
        };
        assert_eq!(self.ended.get(&session), Some(&refused.reason));
        &refused.reason
    }

    pub(super) fn opened(&self, session: Session) -> Vec<OpenLink> {
        let open = |body: &Body| if let Body::OpenLink(open) = body { Some(open.clone()) } else { None };
        self.inbox(session).iter().filter_map(open).collect()
    }

    pub(super) fn epochs(&self, session: Session) -> Vec<Epoch> {
        let epoch = |body: &Body| if let Body::Epoch(epoch) = body { Some(epoch.clone()) } else { None };
        self.inbox(session).iter().filter_map(epoch).collect()
    }

    pub(super) fn up(&mut self, session: Session, incarnation: u32) {
        self.say(session, Said::LinkUp(LinkUp { incarnation }));
    }

    pub(super) fn down(&mut self, session: Session, incarnation: u32) {
        self.say(session, Said::LinkDown(LinkDown { incarnation, reason: "lane 1 failed".to_owned() }));
    }

    pub(super) fn all_links_up(&mut self) {
        for (incarnation, pair) in self.state.live_links() {
            pair.into_iter().for_each(|session| self.up(session, incarnation));
        }
    }

    pub(super) fn enter(&mut self, session: Session, name: &str, group: BarrierGroup) {
        self.say(session, Said::BarrierEnter(BarrierEnter { name: name.to_owned(), group: group.into() }));
    }

    /// How each barrier that the session waited at ended: "" or why it broke.
    pub(super) fn released(&self, session: Session) -> Vec<(String, String)> {
        let released = |body: &Body| match body {
            Body::BarrierReleased(released) => Some((released.name.clone(), released.broken.clone())),
            _ => None,
        };
        self.inbox(session).iter().filter_map(released).collect()
    }
}
