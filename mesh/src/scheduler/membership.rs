//! Who is a member: the checks that a Hello must pass, the ranks, and the deployment's common terms.

use super::SchedulerOptions;
use super::action::{Session, describe, side};
use std::collections::BTreeMap;
use stepmesh_proto::WIRE_VERSION;
use stepmesh_proto::control::{CONTROL_VERSION, Hello, Peer, Role};

/// The longest text that a member says about itself, in bytes.
const MAX_TEXT_BYTES: usize = 4096;

/// What all members of a deployment have in common: the first member's words.
#[derive(Clone, Debug, Default)]
pub(super) struct Terms {
    pub(super) transport: String,
    pub(super) lanes: u32,
    pub(super) layout: String,
    pub(super) workload: String,
}

impl Terms {
    fn of(hello: &Hello) -> Self {
        let Hello { transport, lanes, layout, workload, .. } = hello.clone();
        Self { transport, lanes, layout, workload }
    }

    fn check(&self, hello: &Hello) -> Result<(), String> {
        let lanes = (self.lanes.to_string(), hello.lanes.to_string());
        let fields = [
            ("transport", &self.transport, &hello.transport),
            ("lanes", &lanes.0, &lanes.1),
            ("layout", &self.layout, &hello.layout),
            ("workload", &self.workload, &hello.workload),
        ];
        match fields.iter().find(|(_, ours, theirs)| ours != theirs) {
            None => Ok(()),
            Some((field, ours, theirs)) => {
                Err(format!("{field} differs: the deployment has `{ours}`, this member has `{theirs}`"))
            }
        }
    }
}

/// The members, by session and by rank.
#[derive(Debug, Default)]
pub(super) struct Membership {
    pub(super) epoch: u64,
    members: BTreeMap<Session, Peer>,
    attention: BTreeMap<u32, Session>,
    ffn: BTreeMap<u32, Session>,
    terms: Option<Terms>,
}

impl Membership {
    /// The member of that session, if it is one.
    pub(super) fn get(&self, session: Session) -> Option<&Peer> {
        self.members.get(&session)
    }

    pub(super) fn sessions(&self) -> impl Iterator<Item = Session> {
        self.members.keys().copied()
    }

    /// One side's members by rank.
    pub(super) fn side(&self, role: Role) -> &BTreeMap<u32, Session> {
        if role == Role::Attention { &self.attention } else { &self.ffn }
    }

    /// The other side's members, by rank.
    pub(super) fn opposite(&self, role: Role) -> impl Iterator<Item = (Session, &Peer)> {
        let other = if role == Role::Attention { &self.ffn } else { &self.attention };
        other.values().filter_map(|session| Some((*session, self.members.get(session)?)))
    }

    pub(super) fn terms(&self) -> Terms {
        self.terms.clone().unwrap_or_default()
    }

    /// Gives the session a rank and begins an epoch, or says what does not fit.
    pub(super) fn admit(&mut self, session: Session, hello: Hello, options: &SchedulerOptions) -> Result<Peer, String> {
        check_versions(&hello)?;
        let role = hello.role();
        let (limit, held) = match role {
            Role::Attention => (options.attention, &self.attention),
            Role::Ffn => (options.ffn, &self.ffn),
            Role::Unspecified => return Err("a Hello must say attention or FFN".to_owned()),
        };
        for (field, text) in [
            ("name", &hello.name),
            ("transport", &hello.transport),
            ("layout", &hello.layout),
            ("workload", &hello.workload),
        ] {
            if text.len() > MAX_TEXT_BYTES {
                return Err(format!("{field} has {} bytes: at most {MAX_TEXT_BYTES}", text.len()));
            }
        }
        if let Some(terms) = &self.terms {
            terms.check(&hello)?;
        }
        let rank = match hello.rank {
            Some(rank) if rank >= limit => {
                return Err(format!(
                    "{} rank {rank} is out of range: the deployment has {limit} {} instances, ranks 0 to {}",
                    side(role),
                    side(role),
                    limit - 1
                ));
            }
            Some(rank) => match held.get(&rank).and_then(|holder| self.members.get(holder)) {
                Some(holder) => return Err(format!("that rank is taken by {}", describe(holder))),
                None => rank,
            },
            None => match (0..limit).find(|rank| !held.contains_key(rank)) {
                Some(rank) => rank,
                None => return Err(format!("all {limit} {} ranks are taken", side(role))),
            },
        };
        let peer = Peer { member: session.0, role: role.into(), rank, name: hello.name.clone(), pid: hello.pid };
        self.terms.get_or_insert_with(|| Terms::of(&hello));
        self.side_mut(role).insert(rank, session);
        self.members.insert(session, peer.clone());
        self.epoch += 1;
        Ok(peer)
    }

    /// Frees a member's rank and begins an epoch. When the last is gone the terms are open again.
    pub(super) fn remove(&mut self, session: Session) -> Option<Peer> {
        let peer = self.members.remove(&session)?;
        self.side_mut(peer.role()).remove(&peer.rank);
        if self.members.is_empty() {
            self.terms = None;
        }
        self.epoch += 1;
        Some(peer)
    }

    fn side_mut(&mut self, role: Role) -> &mut BTreeMap<u32, Session> {
        if role == Role::Attention { &mut self.attention } else { &mut self.ffn }
    }
}

fn check_versions(hello: &Hello) -> Result<(), String> {
    let wire = u32::from(WIRE_VERSION);
    for (name, ours, theirs) in
        [("control", CONTROL_VERSION, hello.control_version), ("wire", wire, hello.wire_version)]
    {
        if ours != theirs {
            return Err(format!(
                "this scheduler speaks version {ours} of the {name} protocol, the member version {theirs}: run the \
                 same release everywhere"
            ));
        }
    }
    Ok(())
}
