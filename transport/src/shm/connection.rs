//! A proven link: its rings, its socket, and the regions that each end has let the other use.

use super::MAX_LANES;
use super::doorbell::Doorbell;
use super::memory::{self, SharedMemory};
use super::ring::{CAPACITY, Consumer, Nonsense, Producer};
use super::rings::{Farewell, Rings, Words};
use super::socket::{Received, Socket, random};
use super::wire::{GrantDescriptor, Packet};
use crate::{
    Access, Completion, Disconnect, LinkId, Placement, Provider, Region, RemoteRegion, TransportError, round_to_page,
};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Regions that one end may grant over one link.
pub(super) const MAX_GRANTS: usize = 256;

/// A peer's region that was taken up.
pub(super) struct Import {
    pub(super) key: u64,
    pub(super) access: Access,
    pub(super) region: Region,
}

/// A link that carries work. Apart from what other threads write.
#[repr(align(128))]
pub(super) struct Connection {
    /// None once the peer has hung up.
    socket: Option<Socket>,
    rings: Rings,
    pub(super) producers: Vec<Producer<Words>>,
    consumers: Vec<Consumer<Words>>,
    /// The peer's.
    pub(super) bell: Doorbell,
    /// Signals of each lane that were not yet reported.
    pub(super) unreported: [usize; MAX_LANES as usize],
    /// A lane was found full since the last wait.
    pub(super) blocked: bool,
    /// Something has arrived since the sockets were seen to.
    pub(super) spoke: bool,
    /// By key.
    imports: Vec<Import>,
    arrived: Vec<(GrantDescriptor, OwnedFd)>,
    granted: Vec<Region>,
    ending: Option<Ending>,
}

/// A link whose peer is gone is read to the end of its rings.
struct Ending {
    reason: Disconnect,
    /// What can be left in the rings; a peer that goes on writing is not listened to for longer.
    left: usize,
}

impl Connection {
    pub(super) fn new(socket: Socket, rings: Rings, bell: Doorbell) -> Box<Self> {
        let (producers, consumers) = (rings.producers(), rings.consumers());
        Box::new(Self {
            socket: Some(socket),
            rings,
            producers,
            consumers,
            bell,
            unreported: [0; MAX_LANES as usize],
            blocked: false,
            spoke: false,
            imports: Vec::new(),
            arrived: Vec::new(),
            granted: Vec::new(),
            ending: None,
        })
    }

    pub(super) fn socket(&self) -> Option<&Socket> {
        self.socket.as_ref()
    }

    /// Whether the peer is still there, as far as is known.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.ending.is_none()
    }

    /// Whether a poll would find something.
    #[inline]
    pub(super) fn is_ready(&self) -> bool {
        self.ending.is_some() || self.consumers.iter().any(Consumer::is_ready)
    }

    /// Takes what has arrived in the rings, until `completions` has `limit` of them.
    #[inline]
    pub(super) fn collect(
        &mut self,
        link: LinkId,
        limit: usize,
        completions: &mut Vec<Completion>,
    ) -> Result<(), Nonsense> {
        for (lane, consumer) in (0..).zip(&mut self.consumers) {
            let before = completions.len();
            while completions.len() < limit
                && let Some(immediate) = consumer.next()?
            {
                // Not `push`: so it is made where it stays.
                let arrived = std::iter::once(immediate);
                completions.extend(arrived.map(|immediate| Completion::Immediate { link, lane, immediate }));
            }
            if completions.len() > before {
                consumer.release();
                self.spoke = true;
            }
        }
        Ok(())
    }

    /// Once the peer is gone: why, if with the `taken` of this poll `all` is taken that was in the rings, or as much as they
    /// can have held.
    #[cold]
    pub(super) fn conclude(&mut self, taken: usize, all: bool) -> Option<Disconnect> {
        let ending = self.ending.as_mut()?;
        ending.left = ending.left.saturating_sub(taken);
        (all || ending.left == 0).then(|| ending.reason.clone())
    }

    /// Reads the socket: grants, and whether the peer is still there.
    pub(super) fn listen(&mut self) {
        while let Some(socket) = &self.socket {
            let over = match socket.receive() {
                Ok(Received::Nothing) => return,
                Ok(Received::Packet(bytes, fds)) => match self.take_grant(&bytes, fds) {
                    Ok(()) => continue,
                    Err(what) => {
                        self.rings.leave(Farewell::Protocol);
                        Disconnect::Protocol(what)
                    }
                },
                Ok(Received::HungUp) => self.why_gone(),
                Err(what) => Disconnect::PeerGone(what),
            };
            self.socket = None;
            self.ending = Some(Ending { reason: over, left: self.consumers.len() * CAPACITY });
        }
    }

    fn why_gone(&self) -> Disconnect {
        match self.rings.left() {
            Some(Farewell::Closed) => Disconnect::Closed,
            Some(Farewell::AccessRefused) => {
                Disconnect::AccessRefused("the peer asked for an access that it was not granted".into())
            }
            Some(Farewell::Protocol) => Disconnect::Protocol("the peer could make no sense of this side".into()),
            None => Disconnect::PeerGone("its process is gone".into()),
        }
    }

    /// Ends the link after an access that the peer has not granted.
    #[cold]
    pub(super) fn refuse(&mut self) {
        self.rings.leave(Farewell::AccessRefused);
        self.socket = None;
        let reason = Disconnect::AccessRefused("this side asked for an access that the peer has not granted".into());
        self.ending = Some(Ending { reason, left: 0 });
        self.bell.ring();
    }

    /// Leaves: the peer reads the rings to their end, and then why.
    pub(super) fn leave(mut self: Box<Self>, farewell: Farewell) {
        self.rings.leave(farewell);
        self.socket = None;
        self.bell.ring();
    }

    fn take_grant(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(), String> {
        let Packet::Grant(grant) = Packet::decode(bytes)? else {
            return Err("a hello after the hello".into());
        };
        if self.arrived.len() + self.imports.len() >= MAX_GRANTS {
            return Err(format!("more than {MAX_GRANTS} grants"));
        }
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| format!("a grant with {} descriptors", fds.len()))?;
        let len = usize::try_from(grant.len).map_err(|_| "a grant larger than an address space")?;
        memory::check(&fd, round_to_page(len.max(1)).map_err(|error| error.to_string())?)?;
        self.arrived.push((grant, fd));
        Ok(())
    }

    /// Passes a region's memory to the peer.
    pub(super) fn grant(&mut self, region: &Region, access: Access) -> Result<GrantDescriptor, TransportError> {
        let Some(memory) = region.memory().as_any().downcast_ref::<SharedMemory>() else {
            return Err(TransportError::Unsupported {
                what: "granting private memory over shm".into(),
                hint: "allocate the region from the shm device, with PeerRead or PeerWrite".into(),
            });
        };
        if self.granted.len() >= MAX_GRANTS {
            return Err(TransportError::invalid(format!("a link takes {MAX_GRANTS} grants")));
        }
        let fd = memory.share(access)?;
        let mut key = [0; 8];
        random(&mut key)?;
        let grant = GrantDescriptor { key: u64::from_le_bytes(key), len: region.len() as u64, access };
        let Some(socket) = &self.socket else {
            return Err(TransportError::invalid("the peer has hung up"));
        };
        socket.send(&Packet::Grant(grant).encode(), &[fd.as_fd()]).map_err(|errno| {
            let what = "passing a region to the peer, which must poll or import to take earlier ones";
            TransportError::system(what, errno)
        })?;
        self.granted.push(region.clone());
        Ok(grant)
    }

    /// Maps a region that the peer has passed.
    pub(super) fn import(
        &mut self,
        link: LinkId,
        grant: GrantDescriptor,
        placement: Option<Placement>,
    ) -> Result<RemoteRegion, TransportError> {
        self.listen();
        let GrantDescriptor { key, len, access } = grant;
        let remote = |region: &Region| RemoteRegion { link, key, len, access, mapped: Some(region.clone()) };
        if let Some(import) = self.imported(key) {
            return match placement {
                None => Ok(remote(&import.region)),
                Some(_) => Err(TransportError::invalid("the region is mapped elsewhere already")),
            };
        }
        let Some(index) = self.arrived.iter().position(|(arrived, _)| *arrived == grant) else {
            let what = "no such region was granted over this link".into();
            return Err(TransportError::Descriptor { provider: Provider::Shm, what });
        };
        let memory = SharedMemory::import(&self.arrived[index].1, len as usize, access, placement)?;
        let region = Region::new(Arc::new(memory));
        let remote = remote(&region);
        self.arrived.swap_remove(index);
        let place = self.imports.partition_point(|import| import.key < key);
        self.imports.insert(place, Import { key, access, region });
        Ok(remote)
    }

    /// The import of a key.
    pub(super) fn imported(&self, key: u64) -> Option<&Import> {
        let index = self.imports.binary_search_by_key(&key, |import| import.key).ok()?;
        self.imports.get(index)
    }
}
