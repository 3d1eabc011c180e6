//! A member that speaks to the scheduler as it should, and to its peer with raw transport calls: what a hostile or
//! broken peer can do.

use crate::control::SimControl;
use std::sync::Arc;
use std::time::Duration;
use stepmesh_mesh::control::{Control, ControlEvent};
use stepmesh_mesh::{Direction, Role, SlotLayout};
use stepmesh_proto::control::{self, FromMember, from_member, to_member};
use stepmesh_proto::{Flags, HEADER_MAX_BYTES, Header, Immediate};
use stepmesh_transport::{
    Access, Completion, Device, Endpoint, LinkId, LinkSecret, LinkSpec, Op, Region, Remote, RemoteRegion, Side, Source,
    Work,
};

pub(crate) struct Rogue {
    role: Role,
    rank: u32,
    device: Arc<dyn Device>,
    endpoint: Box<dyn Endpoint>,
    control: SimControl,
    layout: SlotLayout,
    lanes: u8,
    /// The latest link.
    pub(crate) incarnation: u32,
    link: Option<LinkId>,
    connected: bool,
    grants: Option<Vec<Vec<u8>>>,
    regions: Option<[Region; 2]>,
    peer_headers: Option<RemoteRegion>,
    /// The immediates that have come over the latest link.
    pub(crate) immediates: Vec<Immediate>,
    /// Transfers that are granted but not announced: the link stays half up.
    pub(crate) withholds_grants: bool,
}

impl Rogue {
    pub(crate) fn new(
        role: Role,
        rank: u32,
        device: Arc<dyn Device>,
        mut control: SimControl,
        layout: SlotLayout,
        lanes: u8,
    ) -> Self {
        let hello = control::Hello {
            control_version: control::CONTROL_VERSION,
            wire_version: u32::from(stepmesh_proto::WIRE_VERSION),
            role: role.to_control() as i32,
            rank: Some(rank),
            name: "rogue".into(),
            transport: "mem".into(),
            lanes: u32::from(lanes),
            layout: layout.describe(),
            workload: "echo".into(),
            pid: 666,
        };
        control.send(FromMember { body: Some(from_member::Body::Hello(hello)) }).unwrap();
        let endpoint = device.endpoint().unwrap();
        Self {
            role,
            rank,
            device,
            endpoint,
            control,
            layout,
            lanes,
            incarnation: 0,
            link: None,
            connected: false,
            grants: None,
            regions: None,
            peer_headers: None,
            immediates: Vec::new(),
            withholds_grants: false,
        }
    }

    fn say(&mut self, body: from_member::Body) {
        self.control.send(FromMember { body: Some(body) }).unwrap();
    }

    pub(crate) fn is_up(&self) -> bool {
        self.peer_headers.is_some()
    }

    pub(crate) fn poll(&mut self) {
        while let Some(event) = self.control.poll() {
            if let ControlEvent::Message(message) = event {
                self.obey(message.body.unwrap());
            }
        }
        let mut completions = Vec::new();
        self.endpoint.poll(&mut completions).unwrap();
        for completion in completions {
            match completion {
                Completion::Connected { link } if Some(link) == self.link => self.grant(link),
                Completion::Immediate { link, immediate, .. } if Some(link) == self.link => {
                    self.immediates.push(Immediate::decode(immediate).unwrap());
                }
                Completion::Disconnected { link, .. } if Some(link) == self.link => self.close("disconnected"),
                _ => {}
            }
        }
        self.import();
    }

    fn obey(&mut self, body: to_member::Body) {
        match body {
            to_member::Body::OpenLink(open) => {
                let spec = LinkSpec {
                    incarnation: open.incarnation,
                    secret: LinkSecret(open.secret.try_into().unwrap()),
                    lanes: self.lanes,
                    side: if self.role == Role::Attention { Side::Active } else { Side::Passive },
                };
                let (link, descriptor) = self.endpoint.open(spec).unwrap();
                self.incarnation = open.incarnation;
                self.link = Some(link);
                self.immediates.clear();
                let incarnation = open.incarnation;
                self.say(from_member::Body::LinkOffer(control::LinkOffer { incarnation, descriptor }));
            }
            to_member::Body::LinkOffer(offer) if offer.incarnation == self.incarnation => {
                let link = self.link.unwrap();
                self.endpoint.connect(link, &offer.descriptor, Duration::from_secs(5)).unwrap();
            }
            to_member::Body::LinkGrants(grants) if grants.incarnation == self.incarnation => {
                self.grants = Some(grants.descriptors);
            }
            to_member::Body::CloseLink(close) if close.incarnation == self.incarnation => self.close("told to"),
            _ => {}
        }
    }

    fn grant(&mut self, link: LinkId) {
        self.connected = true;
        let receives = if self.role == Role::Attention { Direction::F2A } else { Direction::A2F };
        let sizes = [self.layout.headers_bytes(), self.layout.area_bytes(receives).unwrap()];
        let regions = sizes.map(|bytes| self.device.allocate(bytes, Access::PeerWrite, None).unwrap());
        let grant = |region| self.endpoint.grant(link, region, Access::PeerWrite).unwrap();
        let descriptors = regions.iter().map(grant).collect();
        self.regions = Some(regions);
        let incarnation = self.incarnation;
        if !self.withholds_grants {
            self.say(from_member::Body::LinkGrants(control::LinkGrants { incarnation, descriptors }));
        }
    }

    fn import(&mut self) {
        if !self.connected || self.peer_headers.is_some() {
            return;
        }
        let (Some(grants), Some(link)) = (&self.grants, self.link) else { return };
        let Ok(region) = self.endpoint.import(link, &grants[0], None) else { return };
        self.peer_headers = Some(region);
        let incarnation = self.incarnation;
        self.say(from_member::Body::LinkUp(control::LinkUp { incarnation }));
    }

    fn close(&mut self, reason: &str) {
        let Some(link) = self.link.take() else { return };
        self.endpoint.close(link);
        (self.connected, self.grants, self.regions, self.peer_headers) = (false, None, None, None);
        let down = control::LinkDown { incarnation: self.incarnation, reason: reason.into() };
        self.say(from_member::Body::LinkDown(down));
    }

    /// A header as an honest member would send it.
    pub(crate) fn header(&self, slot: u16, sequence: u16) -> Header {
        let mut header = Header::default();
        header.incarnation = self.incarnation;
        header.slot = slot;
        header.sequence = sequence;
        header.source = self.rank as u16;
        header.flags = if self.role == Role::Ffn { Flags::REPLY } else { Flags::NONE };
        header
    }

    /// Sends a transfer without a payload.
    pub(crate) fn transfer(&mut self, header: &Header) {
        let mut bytes = [0; HEADER_MAX_BYTES];
        let length = header.encode(&mut bytes);
        let immediate = Immediate { slot: header.slot, lanes: 1, lane: 0, sequence: header.sequence };
        self.write(header.slot, &bytes[..length], immediate.encode().unwrap());
    }

    /// Writes these bytes where the slot's header belongs, and announces them with these 32 bits.
    pub(crate) fn write(&mut self, slot: u16, bytes: &[u8], immediate: u32) {
        let region = self.peer_headers.clone().unwrap();
        let remote = Remote { region: &region, offset: u64::from(slot) * HEADER_MAX_BYTES as u64 };
        self.post(Op::WriteImmediate { source: Source::Inline(bytes), remote: Some(remote), immediate });
    }

    /// Writes outside of what it was granted.
    pub(crate) fn write_outside(&mut self) {
        let region = self.peer_headers.clone().unwrap();
        let remote = Remote { region: &region, offset: region.len - 1 };
        self.post(Op::Write { source: Source::Inline(&[1, 2]), remote });
    }

    /// Announces something without writing anything.
    pub(crate) fn announce(&mut self, immediate: u32) {
        self.post(Op::WriteImmediate { source: Source::Inline(&[]), remote: None, immediate });
    }

    fn post(&mut self, op: Op<'_>) {
        self.endpoint.post(self.link.unwrap(), 0, &[Work { op, signal: None }]).unwrap();
    }
}
