//! How the connections of an endpoint's links are made, event by event.

use super::channel::Event;
use super::identifier::event_error;
use super::message::{Origin, Request};
use super::sys::*;
use super::{About, Connection, Identifier, Offer};
use crate::verbs::control::Message;
use crate::verbs::descriptor::Contact;
use crate::verbs::endpoint::VerbsEndpoint;
use crate::verbs::link::{Link, Phase};
use crate::{Disconnect, LinkId, Side, TransportError};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Events that are taken at a time.
const EVENTS: usize = 64;
/// How often a poller looks for events while links wait for their connections.
pub(in super::super) const PERIOD: Duration = Duration::from_millis(2);
/// The reason, in the numbers of the InfiniBand specification, of a refusal by the peer and not by its device.
const REFUSED_BY_USER: i32 = 28;

fn not_connected(error: &TransportError) -> Disconnect {
    Disconnect::NotConnected(error.to_string())
}

impl VerbsEndpoint {
    /// Begins to make a link's connections; answers the requests that have come for it already.
    pub(in super::super) fn establish(&mut self, id: LinkId, now: Instant) {
        let Some(link) = self.links.get(&id) else { return };
        let (side, lanes) = (link.spec.side, link.spec.lanes);
        for number in 0..=lanes {
            let begun = match side {
                Side::Active => self.dial(id, number, now).map_err(|error| not_connected(&error)),
                Side::Passive => self.answer(id, number),
            };
            if let Err(reason) = begun {
                return self.end(id, reason, None);
            }
        }
    }

    /// Finding the address, and then the route, may each take half of the time, so that what fails is told.
    fn dial(&mut self, id: LinkId, number: u8, now: Instant) -> Result<(), TransportError> {
        let (Some(manager), Some(link)) = (&self.manager, self.links.get_mut(&id)) else { return Ok(()) };
        let Some(to) = peer_address(link, number) else { return Ok(()) };
        let from = SocketAddr::new(manager.addresses()[link.rail_of(number.saturating_sub(1))].ip(), 0);
        let identifier = Identifier::new(&manager.channel, About::Connection(id, number).encode())?;
        identifier.resolve_address(from, to, link.time_left(now) / 2)?;
        if let Some(connections) = &mut link.connections {
            connections.put(number, Connection::Dialled(identifier));
        }
        Ok(())
    }

    /// Takes what has happened to connections, if some are awaited or something is known to have.
    pub(in super::super) fn take_calls(&mut self, now: Instant) {
        let awaited = self.links.values().any(Link::awaits_connections);
        let Some(manager) = self.manager.as_mut().filter(|manager| awaited || manager.called) else { return };
        manager.called = false;
        for _ in 0..EVENTS {
            let Some(event) = self.manager.as_ref().and_then(|manager| manager.channel.take()) else { return };
            self.take_event(event, now);
        }
        // There may be more.
        if let Some(manager) = &mut self.manager {
            manager.called = true;
        }
        self.remind(now);
    }

    fn take_event(&mut self, event: Event, now: Instant) {
        match About::decode(event.about) {
            About::Listener(rail) => {
                if let Some(identifier) = event.request {
                    self.take_request(rail, identifier, event.offer, &event.message);
                }
            }
            About::Connection(id, number) => {
                if self.links.get(&id).is_some_and(Link::awaits_connections)
                    && let Err(reason) = self.advance(id, number, &event, now)
                {
                    self.end(id, reason, None);
                }
            }
        }
    }

    /// Keeps a request that is proven for its link, and refuses any other.
    fn take_request(&mut self, rail: usize, mut identifier: Identifier, offer: Offer, message: &[u8; 56]) {
        let Some(request) = Request::decode(message) else { return identifier.reject() };
        let is_meant = |link: &Link| {
            link.spec.side == Side::Passive && link.spec.incarnation == request.incarnation && link.awaits_connections()
        };
        let found = self.links.iter_mut().find(|(_, link)| is_meant(link));
        let Some((&id, link)) = found else { return identifier.reject() };
        let meets = link.rail_of(request.number.saturating_sub(1)) == rail;
        let Some(connections) = &mut link.connections else { return identifier.reject() };
        let [_, gid] = identifier.gids();
        let origin = Origin { gid, queue_pair: offer.number };
        let proven = request.is_proven(message, &link.spec, &connections.nonce, origin);
        if !proven || !meets || !connections.is_free(request.number) {
            return identifier.reject();
        }
        identifier.set_about(About::Connection(id, request.number).encode());
        connections.put(request.number, Connection::Asked(identifier, request, offer));
        if matches!(link.phase, Phase::Connecting { .. })
            && let Err(reason) = self.answer(id, request.number)
        {
            self.end(id, reason, None);
        }
    }

    /// Accepts the request for a connection, if it has come.
    fn answer(&mut self, id: LinkId, number: u8) -> Result<(), Disconnect> {
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let Some(connections) = &mut link.connections else { return Ok(()) };
        let (identifier, request, offer) = match connections.take(number) {
            Connection::Asked(identifier, request, offer) => (identifier, request, offer),
            other => {
                connections.put(number, other);
                return Ok(());
            }
        };
        let asked = connections.nonce;
        let expected = link.peer.as_ref().map(|peer| &peer.contact);
        if !matches!(expected, Some(Contact::Listeners { nonce, .. }) if *nonce == request.nonce) {
            identifier.reject();
            return Err(Disconnect::Rejected("a request for another half than the peer's".into()));
        }
        let Some(pair) = link.pair(number) else { return Ok(()) };
        let [gid, _] = identifier.gids();
        let queue_pair = pair.half().number;
        let Some(message) = request.answer(&link.spec, &asked, Origin { gid, queue_pair }) else { return Ok(()) };
        let connected = pair.connect_by(&identifier).and_then(|()| {
            let reads = pair.offer();
            let offer = Offer {
                number: queue_pair,
                answered_reads: offer.answered_reads.min(reads.answered_reads),
                reads: offer.reads.min(reads.reads),
            };
            identifier.accept(offer, pair.retries(), &message)
        });
        connected.map_err(|error| not_connected(&error))?;
        if let Some(connections) = &mut link.connections {
            connections.put(number, Connection::Made { _identifier: identifier });
        }
        Ok(())
    }

    /// The next step of a connection; an error ends the link.
    fn advance(&mut self, id: LinkId, number: u8, event: &Event, now: Instant) -> Result<(), Disconnect> {
        let (links, rails) = (&mut self.links, &self.rails);
        let Some(link) = links.get_mut(&id) else { return Ok(()) };
        let rail = link.rail_of(number.saturating_sub(1));
        let time_left = link.time_left(now);
        let Some(connections) = &mut link.connections else { return Ok(()) };
        let identifier = match connections.take(number) {
            Connection::Dialled(identifier) => identifier,
            // The peer has given up, before it was answered.
            Connection::Asked(..) => return Ok(()),
            other => {
                connections.put(number, other);
                return failure(event, peer_address(link, number)).map_or(Ok(()), Err);
            }
        };
        let request = Request { incarnation: link.spec.incarnation, number, nonce: connections.nonce };
        let peer = link.peer.as_ref().map(|peer| &peer.contact);
        let (Some(pair), Some(Contact::Listeners { nonce: asked, .. })) = (link.pair(number), peer) else {
            return Ok(());
        };
        let next = match event.kind {
            RDMA_CM_EVENT_ADDR_RESOLVED if !identifier.is_on(&rails[rail].context) => {
                let name = &rails[rail].context.name;
                return Err(Disconnect::NotConnected(format!("the way to the peer does not lead over {name}")));
            }
            RDMA_CM_EVENT_ADDR_RESOLVED => identifier.resolve_route(time_left / 2),
            RDMA_CM_EVENT_ROUTE_RESOLVED => {
                let [gid, _] = identifier.gids();
                let offer = pair.offer();
                let message = request.encode(&link.spec, asked, Origin { gid, queue_pair: offer.number });
                let Some(message) = message else { return Ok(()) };
                identifier.connect(offer, pair.retries(), &message)
            }
            RDMA_CM_EVENT_CONNECT_RESPONSE => {
                let [_, gid] = identifier.gids();
                let origin = Origin { gid, queue_pair: event.offer.number };
                if !request.is_answered(&event.message, &link.spec, asked, origin) {
                    identifier.reject();
                    return Err(Disconnect::Rejected("the link secret was not proven in the answer".into()));
                }
                pair.connect_by(&identifier).and_then(|()| identifier.establish())
            }
            _ => match failure(event, peer_address(link, number)) {
                Some(reason) => return Err(reason),
                None => Ok(()),
            },
        };
        next.map_err(|error| not_connected(&error))?;
        let made = event.kind == RDMA_CM_EVENT_CONNECT_RESPONSE;
        let connection =
            if made { Connection::Made { _identifier: identifier } } else { Connection::Dialled(identifier) };
        if let Some(connections) = &mut link.connections {
            connections.put(number, connection);
            if made
                && connections.are_made()
                && let Some(control) = &mut link.control
            {
                control.send(Message::Hello);
            }
        }
        Ok(())
    }
}

/// Where the peer is, for one of the connections; its port is 0 if it is the one that dials.
fn peer_address(link: &Link, number: u8) -> Option<SocketAddr> {
    let Contact::Listeners { addresses, .. } = &link.peer.as_ref()?.contact else { return None };
    addresses.get(usize::from(number.saturating_sub(1)) % addresses.len()).copied()
}

/// Why a link of which this has happened to a connection with `peer` is not connected.
fn failure(event: &Event, peer: Option<SocketAddr>) -> Option<Disconnect> {
    let error = event_error(event.status);
    let peer = peer.map_or_else(|| "the peer".into(), |peer| peer.ip().to_string());
    let why = match event.kind {
        RDMA_CM_EVENT_ADDR_ERROR => format!("the address {peer} cannot be resolved: {error}"),
        RDMA_CM_EVENT_ROUTE_ERROR => format!("there is no route to {peer}: {error}"),
        RDMA_CM_EVENT_UNREACHABLE | RDMA_CM_EVENT_CONNECT_ERROR => format!("{peer} does not answer: {error}"),
        RDMA_CM_EVENT_REJECTED if event.status == REFUSED_BY_USER => {
            let why = "the peer knows of no such link, or did not believe that this end knows the link secret";
            return Some(Disconnect::Rejected(why.into()));
        }
        RDMA_CM_EVENT_REJECTED => {
            format!("{peer} refuses, for reason {} of the InfiniBand specification", event.status)
        }
        RDMA_CM_EVENT_DISCONNECTED => format!("{peer} has given up"),
        RDMA_CM_EVENT_DEVICE_REMOVAL => "the device is being removed".into(),
        _ => return None,
    };
    Some(Disconnect::NotConnected(why))
}
