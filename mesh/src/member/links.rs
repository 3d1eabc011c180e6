//! A link's life on this side, from its opening to its fence.
//!
//! A link is born with the scheduler's `OpenLink`, which names a fresh incarnation and secret. Each end opens its half
//! and sends the offer; connects when the other's offer is there; grants fresh regions when connected; is up when it
//! has taken up the other's grants. It ends by being **fenced**: closed, its regions dropped, nothing of it still in
//! use, and `LinkDown` said. When both ends have said so the scheduler opens the next incarnation.

use super::{Fencing, LinkEnd, Member};
use crate::layout::Direction;
use crate::link::{InUse, Link, Stage};
use crate::{MeshError, MeshEvent, Peer, Role};
use std::sync::{Arc, Weak};
use stepmesh_proto::control::{self, from_member};
use stepmesh_transport::{Access, LinkSecret, LinkSpec, Placement, Side, TransportError};

impl Member {
    pub(super) fn open_link(&mut self, open: control::OpenLink) {
        let Some(peer) = open.peer.as_ref().and_then(Peer::from_control) else { return };
        let rank = peer.rank as usize;
        let Ok(secret) = <[u8; 16]>::try_from(open.secret.as_slice()) else { return };
        if peer.role == self.role || rank >= self.links.len() {
            return;
        }
        if self.links[rank].is_some() {
            self.end_link(rank, "replaced by a new link".into());
        }
        let spec = LinkSpec {
            incarnation: open.incarnation,
            secret: LinkSecret(secret),
            lanes: self.options.lanes,
            side: if self.role == Role::Attention { Side::Active } else { Side::Passive },
        };
        match self.endpoint.open(spec) {
            Ok((id, descriptor)) => {
                let deadline = self.clock.now() + self.options.connect_timeout;
                let link = Link::new(peer, open.incarnation, id, &self.options, deadline);
                self.links[rank] = Some(link);
                self.is_settled = false;
                self.by_id.push((id, rank));
                let incarnation = open.incarnation;
                self.say(from_member::Body::LinkOffer(control::LinkOffer { incarnation, descriptor }));
            }
            Err(error) => self.say_down(open.incarnation, error.to_string()),
        }
    }

    /// Allocates this incarnation's landing slots, grants them, and sends the descriptors.
    pub(super) fn grant(&mut self, rank: usize) -> Result<(), MeshError> {
        let layout = self.options.layout.clone();
        let headers = self.device.allocate(layout.headers_bytes(), Access::PeerWrite, None)?;
        let landing = if self.reads_in_place() {
            None
        } else {
            let bytes = layout.area_bytes(self.receives())?;
            let place = self.space.as_ref().map(|space| Placement::take(space, rank * bytes, bytes)).transpose()?;
            Some(self.device.allocate_payload(bytes, Access::PeerWrite, place)?)
        };
        let outbox = match self.role {
            _ if self.maps() => None,
            Role::Attention => self.outbox.clone(),
            Role::Ffn => Some(self.device.allocate_payload(layout.area_bytes(Direction::F2A)?, Access::Local, None)?),
        };
        let shared = self.outbox.clone().filter(|_| self.maps());
        let Some(link) = self.links[rank].as_mut() else { return Ok(()) };
        let written = [Some(&headers), landing.as_ref()].into_iter().flatten();
        let granted = written
            .map(|region| (region, Access::PeerWrite))
            .chain(shared.iter().map(|region| (region, Access::PeerRead)));
        let descriptors = granted.map(|(region, access)| self.endpoint.grant(link.id, region, access));
        let descriptors = descriptors.collect::<Result<_, _>>()?;
        (link.headers, link.landing, link.outbox) = (Some(headers), landing, outbox);
        link.stage = Stage::Granting;
        let incarnation = link.incarnation;
        self.say(from_member::Body::LinkGrants(control::LinkGrants { incarnation, descriptors }));
        self.take_up_grants(rank);
        Ok(())
    }

    /// Imports the peer's regions when both they and the connection are there; the link is then up.
    pub(super) fn take_up_grants(&mut self, rank: usize) {
        match self.try_import(rank) {
            Ok(true) => {
                let Some(link) = self.links[rank].as_mut() else { return };
                link.stage = Stage::Up;
                let incarnation = link.incarnation;
                let early = std::mem::take(&mut link.early);
                let peer = link.peer.clone();
                self.events.push_back(MeshEvent::LinkUp(peer));
                self.say(from_member::Body::LinkUp(control::LinkUp { incarnation }));
                for immediate in early {
                    self.handle_immediate(rank, immediate);
                }
            }
            Ok(false) => {}
            Err(error) => self.fence(rank, error.to_string()),
        }
    }

    /// A peer grants its headers, then its landing slots unless it reads in place, then the send slots that are to be read in
    /// place, if any.
    fn try_import(&mut self, rank: usize) -> Result<bool, MeshError> {
        let layout = self.options.layout.clone();
        let (request_area, sends) = (layout.area_bytes(Direction::A2F)?, layout.area_bytes(self.sends())?);
        let (reads_in_place, is_read_in_place) = (self.reads_in_place(), self.role == Role::Attention && self.maps());
        let Some(link) = self.links[rank].as_mut() else { return Ok(false) };
        let Some(grants) = link.grants.as_ref().filter(|_| link.stage == Stage::Granting) else { return Ok(false) };
        let expected = 1 + usize::from(!is_read_in_place) + usize::from(reads_in_place);
        if grants.len() != expected {
            return Err(MeshError::Refused(format!("{} regions granted, expected {expected}", grants.len())));
        }
        if link.peer_headers.is_none() {
            let mut import = |descriptor: &[u8], bytes: usize| {
                let region = self.endpoint.import(link.id, descriptor, None)?;
                if region.access != Access::PeerWrite || region.len < bytes as u64 {
                    let (granted, access) = (region.len, region.access);
                    return Err(MeshError::Refused(format!("{granted} bytes with {access:?} for {bytes} to land in")));
                }
                Ok(region)
            };
            let headers = import(&grants[0], layout.headers_bytes())?;
            link.peer_landing = (!is_read_in_place).then(|| import(&grants[1], sends)).transpose()?;
            link.peer_headers = Some(headers);
        }
        if reads_in_place && link.peer_outbox.is_none() {
            let take = |space| Placement::take(space, rank * request_area, request_area);
            let placement = match self.space.as_ref().map(take).transpose() {
                Ok(placement) => placement,
                // A batch of the earlier incarnation is still in use: later.
                Err(TransportError::PlaceTaken { .. }) => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            let outbox = self.endpoint.import(link.id, &grants[expected - 1], placement)?;
            let mapped = outbox.mapped.filter(|region| region.len() >= request_area);
            let missing = || MeshError::Refused(format!("send slots of {} bytes", outbox.len));
            link.peer_outbox = Some(mapped.ok_or_else(missing)?);
        }
        Ok(true)
    }

    /// Ends a link from this side and tells the scheduler once nothing of it is in use.
    pub(crate) fn fence(&mut self, rank: usize, reason: String) {
        let Some(incarnation) = self.links[rank].as_ref().map(|link| link.incarnation) else { return };
        let in_use = self.end_link(rank, reason.clone());
        self.fencing.push(Fencing { incarnation, reason, in_use });
        self.is_settled = false;
        self.finish_fences();
    }

    /// Lets other transfers on the link finish, then fences it.
    pub(crate) fn drain(&mut self, rank: usize) {
        let until = self.clock.now() + self.options.drain;
        if let Some(link) = self.links[rank].as_mut()
            && link.stage == Stage::Up
        {
            link.stage = Stage::Draining(until);
            self.is_linked = false;
            self.is_settled = false;
        }
    }

    /// Closes the link and forgets it; regions go as soon as nobody uses them.
    pub(super) fn end_link(&mut self, rank: usize, reason: String) -> Weak<InUse> {
        let Some(link) = self.links[rank].take() else { return Weak::new() };
        self.is_linked = false;
        self.endpoint.close(link.id);
        self.by_id.retain(|(id, _)| *id != link.id);
        self.arrivals.retain(|arrival| arrival.rank != rank);
        self.ended.push_back(LinkEnd { rank, peer: link.peer.clone(), reason: reason.clone() });
        self.events.push_back(MeshEvent::LinkDown { peer: link.peer.clone(), reason });
        Arc::downgrade(&link.in_use)
    }

    fn finish_fences(&mut self) {
        let mut index = 0;
        while index < self.fencing.len() {
            if self.fencing[index].in_use.strong_count() > 0 {
                index += 1;
                continue;
            }
            let fence = self.fencing.swap_remove(index);
            self.say_down(fence.incarnation, fence.reason);
        }
    }

    /// Retries what could not be done at once, and gives up on links that do not come up.
    pub(super) fn tend_links(&mut self) {
        self.finish_fences();
        let direction = self.sends();
        let mut late = None;
        for rank in 0..self.links.len() {
            let Some(link) = self.links[rank].as_mut() else { continue };
            match link.stage {
                Stage::Up | Stage::Draining(_) => {
                    if link.has_backlog()
                        && let Err(error) = link.flush(self.endpoint.as_mut(), &self.options.layout, direction)
                    {
                        late = Some((rank, error.to_string()));
                    }
                }
                Stage::Granting | Stage::Connecting => {
                    if self.clock.now() > link.deadline {
                        late = Some((rank, format!("not set up within {:?}", self.options.connect_timeout)));
                    } else if link.stage == Stage::Granting && link.grants.is_some() {
                        self.take_up_grants(rank);
                    }
                }
            }
        }
        if let Some((rank, reason)) = late {
            self.fence(rank, reason);
        }
        let is_up = |link: &Link| link.stage == Stage::Up;
        let is_settled = |link: &Link| is_up(link) && !link.has_backlog();
        self.is_settled = self.fencing.is_empty() && self.links.iter().flatten().all(is_settled);
        self.is_linked = !self.links.is_empty() && self.links.iter().all(|link| link.as_ref().is_some_and(is_up));
    }
}
