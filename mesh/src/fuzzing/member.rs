//! What the scheduler and a peer say to a member, and what the peer writes into its slots.

use super::Input;
use crate::control::{Control, ControlError, ControlEvent};
use crate::{AttentionMesh, FfnMesh, MemberOptions, MeshError, MeshEvent, PartSpec, Policy, Request, SlotLayout};
use prost::Message;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use stepmesh_proto::control::{FromMember, LinkGrants, LinkOffer, OpenLink, ToMember, from_member, to_member::Body};
use stepmesh_proto::{HEADER_MAX_BYTES, Part};
use stepmesh_transport::mem::Fabric;
use stepmesh_transport::{
    Access, Device, Endpoint, LinkId, LinkSecret, LinkSpec, Op, Remote, RemoteRegion, Side, Source, Work,
};

/// Bytes that the peer grants.
const GRANTED: usize = 64 << 10;

/// The control plane's two queues.
#[derive(Default)]
struct Wire {
    to_member: VecDeque<ToMember>,
    said: Vec<from_member::Body>,
}

#[derive(Clone, Default)]
struct Script(Arc<Mutex<Wire>>);

impl Script {
    fn with<T>(&self, act: impl FnOnce(&mut Wire) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell(&self, body: Body) {
        self.with(|wire| wire.to_member.push_back(ToMember { body: Some(body) }));
    }
}

impl Control for Script {
    fn send(&mut self, message: FromMember) -> Result<(), ControlError> {
        self.with(|wire| wire.said.extend(message.body));
        Ok(())
    }

    fn poll(&mut self) -> Option<ControlEvent> {
        self.with(|wire| wire.to_member.pop_front().map(ControlEvent::Message))
    }
}

enum Mesh {
    Attention(AttentionMesh),
    Ffn(FfnMesh),
}

impl Mesh {
    /// Makes progress, and does what an application would.
    fn turn(&mut self) -> Result<bool, MeshError> {
        let mut joined = false;
        match self {
            Self::Attention(mesh) => {
                mesh.poll()?;
                while let Some(event) = mesh.next_event() {
                    joined |= matches!(event, MeshEvent::Joined { .. });
                }
                if let Ok(buffer) = mesh.acquire(0) {
                    let parts = [Part { rows: 2, row_bytes: 16, ..Part::default() }];
                    let ticket = mesh.push_pull(buffer, Request { parts: &parts, ..Request::default() })?;
                    mesh.poll()?;
                    if mesh.take(ticket).is_err() {
                        mesh.cancel(ticket);
                    }
                }
            }
            Self::Ffn(mesh) => {
                mesh.poll()?;
                while let Some(event) = mesh.next_event() {
                    joined |= matches!(event, MeshEvent::Joined { .. });
                }
                while let Some(mut batch) = mesh.try_next_batch(Policy::Any) {
                    for segment in &mut batch.segments {
                        let bytes: usize = (0..9).map(|part| segment.part(part).len()).sum();
                        let claimed: u64 = segment.parts().iter().map(Part::bytes).sum();
                        assert_eq!(bytes as u64, claimed, "a part that lies outside its slot");
                        segment.set_reply(&[Part { rows: 1, row_bytes: 16, ..Part::default() }])?;
                        segment.reply_mut(0).fill(1);
                    }
                    mesh.respond(batch)?;
                }
            }
        }
        Ok(joined)
    }
}

/// The peer: it knows the secret and has transport calls, and does with them what the script says.
struct Peer {
    device: Arc<dyn Device>,
    endpoint: Box<dyn Endpoint>,
    opened: Option<OpenLink>,
    link: Option<LinkId>,
    headers: Option<RemoteRegion>,
}

impl Peer {
    /// Opens its half of the last link that the member was told to open, and tells the member.
    fn open(&mut self, script: &Script, side: Side) -> Option<()> {
        let OpenLink { incarnation, secret, .. } = self.opened.as_ref()?;
        let secret = LinkSecret(secret.as_slice().try_into().ok()?);
        let spec = LinkSpec { incarnation: *incarnation, secret, lanes: 1, side };
        let (link, descriptor) = self.endpoint.open(spec).ok()?;
        let of_link = |said: &from_member::Body| match said {
            from_member::Body::LinkOffer(offer) if offer.incarnation == *incarnation => Some(offer.descriptor.clone()),
            _ => None,
        };
        let offer = script.with(|wire| wire.said.iter().rev().find_map(of_link))?;
        self.endpoint.connect(link, &offer, Duration::from_secs(10)).ok()?;
        script.tell(Body::LinkOffer(LinkOffer { incarnation: *incarnation, descriptor }));
        self.link = Some(link);
        Some(())
    }

    fn grant(&mut self, script: &Script, count: u8) -> Option<()> {
        let incarnation = self.opened.as_ref()?.incarnation;
        let region = self.device.allocate(GRANTED, Access::PeerWrite, None).ok()?;
        let descriptors = (0..count % 4)
            .map(|_| self.endpoint.grant(self.link?, &region, Access::PeerWrite).ok())
            .collect::<Option<_>>()?;
        script.tell(Body::LinkGrants(LinkGrants { incarnation, descriptors }));
        Some(())
    }

    fn import(&mut self, script: &Script) -> Option<()> {
        let incarnation = self.opened.as_ref()?.incarnation;
        let of_link = |said: &from_member::Body| match said {
            from_member::Body::LinkGrants(grants) if grants.incarnation == incarnation => {
                grants.descriptors.first().cloned()
            }
            _ => None,
        };
        let descriptor = script.with(|wire| wire.said.iter().rev().find_map(of_link))?;
        self.headers = self.endpoint.import(self.link?, &descriptor, None).ok();
        Some(())
    }

    /// Writes a header, whose checksum is put right, into a slot's place, and then an immediate.
    fn write(&mut self, slot: u8, header: &[u8], immediate: u32) -> Option<()> {
        let mut header = header[..header.len().min(HEADER_MAX_BYTES)].to_vec();
        repair(&mut header);
        let region = self.headers.as_ref()?;
        let remote = Remote { region, offset: u64::from(slot) * HEADER_MAX_BYTES as u64 };
        let op = Op::WriteImmediate { source: Source::Inline(&header), remote: Some(remote), immediate };
        self.endpoint.post(self.link?, 0, &[Work { op, signal: None }]).ok()
    }
}

/// Makes the checksum of a header right.
fn repair(header: &mut [u8]) {
    let Some(&parts) = header.get(3) else { return };
    if let Some(whole) = header.get_mut(..64 + usize::from(parts % 9) * 24) {
        whole[3] = parts % 9;
        whole[20..24].fill(0);
        let checksum = crc32c::crc32c(whole);
        whole[20..24].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// A script for a member: of the FFN side, or if the first byte is odd of the attention side. Taken if it was admitted.
pub fn member(bytes: &[u8]) -> bool {
    run(bytes).unwrap_or(false)
}

fn run(bytes: &[u8]) -> Option<bool> {
    let mut input = Input(bytes);
    let attention = input.byte() & 1 == 1;
    let part = PartSpec { row_bytes: 16, max_rows: 4 };
    let layout = SlotLayout::new(2, vec![part; 2], vec![part]).ok()?;
    let options = MemberOptions { memory_limit_bytes: 1 << 20, ..MemberOptions::new(layout, "fuzz") };
    let (fabric, script) = (Fabric::default(), Script::default());
    let (device, control, clock) = (fabric.device("member"), Box::new(script.clone()), fabric.clock());
    let (mut mesh, side) = if attention {
        (Mesh::Attention(AttentionMesh::new(options, device, control, clock).ok()?), Side::Passive)
    } else {
        (Mesh::Ffn(FfnMesh::new(options, device, control, clock).ok()?), Side::Active)
    };
    let device = fabric.device("peer");
    let endpoint = device.endpoint().ok()?;
    let mut peer = Peer { device, endpoint, opened: None, link: None, headers: None };
    let mut joined = false;
    let mut completions = Vec::new();
    while let Some(step) = input.step() {
        match step % 8 {
            0..=2 => {
                if let Ok(message) = ToMember::decode(input.chunk()) {
                    if let Some(Body::OpenLink(open)) = &message.body {
                        peer.opened = Some(open.clone());
                    }
                    script.with(|wire| wire.to_member.push_back(message));
                }
            }
            3 => _ = peer.open(&script, side),
            4 => _ = peer.grant(&script, input.byte()),
            5 => _ = peer.import(&script),
            6 => {
                let (slot, immediate) = (input.byte(), input.u32());
                let _ = peer.write(slot, input.chunk(), immediate);
            }
            _ => fabric.advance(Duration::from_millis(u16::from_le_bytes(input.take()).into())),
        }
        for _ in 0..4 {
            fabric.advance(Duration::from_micros(20));
            // A member that gives up says why, and is done.
            match mesh.turn() {
                Ok(now) => joined |= now,
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    return Some(joined);
                }
            }
            completions.clear();
            let _ = peer.endpoint.poll(&mut completions);
        }
    }
    Some(joined)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz_inputs::check;
    use stepmesh_proto::control::{CloseLink, Epoch, Peer as Known, PeerLost, Role, Welcome};
    use stepmesh_proto::{Flags, Header, Immediate};

    fn tell(body: Body) -> Vec<u8> {
        let bytes = ToMember { body: Some(body) }.encode_to_vec();
        [&[0][..], &(bytes.len() as u16).to_le_bytes(), &bytes].concat()
    }

    fn script(attention: bool) -> Vec<u8> {
        let role = if attention { Role::Ffn } else { Role::Attention };
        let known = Known { member: 9, role: role.into(), rank: 0, name: "peer".into(), pid: 1 };
        let welcome =
            Welcome { member: 8, attention: 1, ffn: 1, heartbeat_ms: 100, loss_ms: 300, ..Welcome::default() };
        let open = OpenLink { peer: Some(known.clone()), incarnation: 7, secret: vec![3; 16] };
        let header = |slot, sequence| {
            let mut header = Header::default();
            (header.incarnation, header.slot, header.sequence) = (7, slot, sequence);
            header.flags = if attention { Flags::REPLY } else { Flags::NONE };
            let parts = [Part { rows: 3, row_bytes: 16, ..Part::default() }];
            header.set_parts(&parts).unwrap();
            let mut bytes = [0; HEADER_MAX_BYTES];
            let len = header.encode(&mut bytes);
            let immediate = Immediate { slot, lanes: 1, lane: 0, sequence }.encode().unwrap();
            [&[6, slot as u8][..], &immediate.to_le_bytes(), &(len as u16).to_le_bytes(), &bytes[..len]].concat()
        };
        [
            vec![u8::from(attention)],
            tell(Body::Welcome(welcome)),
            tell(Body::Epoch(Epoch { epoch: 2, complete: true, ..Epoch::default() })),
            tell(Body::OpenLink(open)),
            vec![3, 7, 1, 0, 4, 2, 5, 7, 1, 0],
            header(0, 1),
            header(1, 1),
            vec![7, 1, 0],
            header(0, 2),
            tell(Body::CloseLink(CloseLink { incarnation: 7, reason: "over".into() })),
            tell(Body::PeerLost(PeerLost { peer: Some(known), epoch: 3, reason: "gone".into() })),
        ]
        .concat()
    }

    #[test]
    fn members_that_are_told_anything() {
        check("member", &[script(false), script(true)], member);
    }

    /// It would have fewer ranks than the links that are there.
    #[test]
    fn a_second_welcome_is_refused() {
        let (fabric, script) = (Fabric::default(), Script::default());
        let part = PartSpec { row_bytes: 16, max_rows: 4 };
        let layout = SlotLayout::new(2, vec![part], vec![part]).unwrap();
        let options = MemberOptions::new(layout, "fuzz");
        let control = Box::new(script.clone());
        let mut mesh = FfnMesh::new(options, fabric.device("member"), control, fabric.clock()).unwrap();
        script.tell(Body::Welcome(Welcome { attention: 4, ffn: 1, ..Welcome::default() }));
        mesh.poll().unwrap();
        script.tell(Body::Welcome(Welcome { attention: 1, ffn: 1, ..Welcome::default() }));
        let refusal = mesh.poll().unwrap_err().to_string();
        assert!(refusal.contains("a second Welcome") && mesh.attention() == 4, "{refusal}");
    }
}
