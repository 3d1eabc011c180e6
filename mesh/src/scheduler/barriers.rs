//! Barriers by name and group: who has entered, and when that is everybody.

use super::Session;
use super::action::{Violation, violation};
use std::collections::{BTreeMap, BTreeSet};
use stepmesh_proto::control::{BarrierEnter, BarrierGroup, BarrierReleased, Role};

/// The longest name of a barrier, in bytes.
const MAX_NAME_BYTES: usize = 256;
/// Barriers that one member may be waiting at.
const MAX_ENTERED: usize = 64;

/// Members to tell, and what.
pub(super) type Release = (BTreeSet<Session>, BarrierReleased);

/// The barriers that somebody is waiting at.
#[derive(Debug, Default)]
pub(super) struct Barriers {
    waiting: BTreeMap<(String, BarrierGroup), BTreeSet<Session>>,
}

impl Barriers {
    /// `session` waits at a barrier; everybody is released when the last of `expected(group)` has come.
    pub(super) fn enter(
        &mut self,
        session: Session,
        role: Role,
        enter: BarrierEnter,
        expected: impl FnOnce(BarrierGroup) -> usize,
    ) -> Result<Option<Release>, Violation> {
        let Ok(group) = BarrierGroup::try_from(enter.group) else {
            return violation(format!("barrier group {} does not exist", enter.group));
        };
        if !includes(group, role) {
            return violation("a barrier of the other side only");
        }
        if enter.name.len() > MAX_NAME_BYTES {
            return violation(format!("a barrier's name has at most {MAX_NAME_BYTES} bytes"));
        }
        let entered = self.waiting.values().filter(|waiting| waiting.contains(&session)).count();
        let key = (enter.name, group);
        if entered >= MAX_ENTERED && !self.waiting.contains_key(&key) {
            return violation(format!("waiting at more than {MAX_ENTERED} barriers"));
        }
        let waiting = self.waiting.entry(key.clone()).or_default();
        waiting.insert(session);
        if waiting.len() < expected(group) {
            return Ok(None);
        }
        Ok(self.waiting.remove_entry(&key).map(|(key, waiting)| release(key, waiting, String::new())))
    }

    /// A member is gone: nobody waits any longer at a barrier that was to wait for it.
    pub(super) fn lose(&mut self, session: Session, role: Role, reason: &str) -> Vec<Release> {
        let keys: Vec<_> = self.waiting.keys().filter(|(_, group)| includes(*group, role)).cloned().collect();
        let mut broken = Vec::new();
        for key in keys {
            if let Some((key, mut waiting)) = self.waiting.remove_entry(&key) {
                waiting.remove(&session);
                broken.push(release(key, waiting, reason.to_owned()));
            }
        }
        broken
    }
}

fn release((name, group): (String, BarrierGroup), waiting: BTreeSet<Session>, broken: String) -> Release {
    (waiting, BarrierReleased { name, broken, group: group.into() })
}

fn includes(group: BarrierGroup, role: Role) -> bool {
    match group {
        BarrierGroup::All => true,
        BarrierGroup::Attention => role == Role::Attention,
        BarrierGroup::Ffn => role == Role::Ffn,
    }
}
