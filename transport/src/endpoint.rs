//! The traits that a provider implements, and the values that cross them.

use crate::verbs::VerbsOptions;
use crate::{Access, Memory, Placement, PostError, Region, RemoteRegion, TransportError};
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// The providers of this build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Provider {
    /// Processes of one host.
    Shm,
    /// Any two hosts.
    Tcp,
    /// Hosts with RDMA.
    Verbs,
    /// One process, virtual clock.
    Mem,
}

impl Provider {
    /// Its name in configuration and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
            Self::Mem => "mem",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Provider {
    type Err = TransportError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "shm" => Ok(Self::Shm),
            "tcp" => Ok(Self::Tcp),
            "verbs" => Ok(Self::Verbs),
            "mem" => Ok(Self::Mem),
            other => Err(TransportError::invalid(format!("unknown transport `{other}`: shm, tcp or verbs"))),
        }
    }
}

/// What a device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Which provider this is.
    pub provider: Provider,
    /// A granted region is mapped by the peer: producing a tensor in it is sending it, and a region granted with
    /// [`Access::PeerRead`] is read in place.
    pub maps_peer_memory: bool,
    /// Lanes that a link may have.
    pub max_lanes: u8,
    /// Bytes that [`Source::Inline`] may have.
    pub max_inline: usize,
    /// Work requests that one lane holds before `WouldBlock`.
    pub queue_depth: usize,
    /// Whether it does [`Op::FetchAdd`].
    pub fetch_add: bool,
    /// NIC ports that the lanes of each link are spread over; 1 where there are none.
    pub rails: u8,
}

/// How a device is opened. The defaults work on one host.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// `tcp`: the address to bind and to give to peers. Loopback by default.
    pub address: IpAddr,
    /// `tcp`: the port to listen on; 0 lets the system choose.
    pub port: u16,
    /// How long a connection may take to prove itself before it is dropped.
    pub hello_timeout: Duration,
    /// How long `wait` polls before it sleeps on the provider's event. Zero on machines with few cores.
    pub spin: Duration,
    /// `tcp`: how long a receive on an empty socket polls the network card's queue itself (`SO_BUSY_POLL`), for cards whose
    /// driver can. Zero is off; more than `net.core.busy_read` needs `CAP_NET_ADMIN`.
    pub busy_poll: Duration,
    /// `verbs`: the device and how it is used.
    pub verbs: VerbsOptions,
    /// The GPU that payloads are to be reachable by, as the CUDA driver counts those that are visible: see
    /// [`crate::cuda::beside`].
    pub gpu: Option<u32>,
    /// With `gpu`: payloads stay in host memory, which is pinned for it, whatever the provider: see
    /// [`crate::cuda::beside_pinned`].
    pub gpu_staging: bool,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            address: IpAddr::from([127, 0, 0, 1]),
            port: 0,
            hello_timeout: Duration::from_secs(5),
            spin: Duration::ZERO,
            busy_poll: Duration::ZERO,
            verbs: VerbsOptions::default(),
            gpu: None,
            gpu_staging: false,
        }
    }
}

/// A network interface, or what stands for one.
pub trait Device: Send + Sync {
    /// What it can do.
    fn properties(&self) -> Properties;

    /// Allocates `len` zeroed bytes of registered memory that may be granted up to `access`, at `placement` if given.
    fn allocate(&self, len: usize, access: Access, placement: Option<Placement>) -> Result<Region, TransportError>;

    /// Registers memory that the caller owns, and that peers may be granted up to `access`: host memory (of the process, or
    /// mapped from a file or a shared memory), or a device's. It must have bytes and begin at a page, and be writable to
    /// be granted for writing. The region and whatever uses it share the memory with the caller until the last is gone.
    ///
    /// | provider | host memory | device memory |
    /// |---|---|---|
    /// | `verbs` | any | by dma-buf, else by peer memory |
    /// | `tcp`, `mem` | any (`mem` without mapped peer memory) | refused: [`TransportError::DeviceMemory`] |
    /// | `shm` | [`Access::Local`] only | refused |
    fn register(&self, memory: Arc<dyn Memory>, access: Access) -> Result<Region, TransportError> {
        Err(TransportError::Unsupported {
            what: format!("registering {} bytes of the caller's with {}", memory.len(), self.properties().provider),
            hint: format!("allocate a region for {access:?} on the device, and copy"),
        })
    }

    /// Allocates a region for tensors: where a GPU is beside the device, one that the GPU's streams reach, perhaps device
    /// memory; zeroed unless it is. See [`crate::cuda::beside`].
    fn allocate_payload(
        &self,
        len: usize,
        access: Access,
        placement: Option<Placement>,
    ) -> Result<Region, TransportError> {
        self.allocate(len, access, placement)
    }

    /// Whether regions for tensors, of this side and of peers, can be placed.
    fn places_payloads(&self) -> bool {
        true
    }

    /// Makes an endpoint: a completion queue and the links that will share it. One thread owns it.
    fn endpoint(&self) -> Result<Box<dyn Endpoint>, TransportError>;
}

/// One link of an endpoint. Never used again after the link is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u32);

/// Opaque bytes that a peer of the same provider understands; carried by the control plane.
pub type Descriptor = Vec<u8>;

/// 128 random bits that both ends of one link hold and no third party: what a data-plane connection must prove that
/// it knows before a frame of it is looked at. Never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LinkSecret(pub [u8; 16]);

impl fmt::Debug for LinkSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LinkSecret(..)")
    }
}

/// Which end of a link this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Dials (the attention side).
    Active,
    /// Is dialled (the FFN side).
    Passive,
}

/// What both ends of a link agree on beforehand, by the control plane.
#[derive(Clone, Copy, Debug)]
pub struct LinkSpec {
    /// The link's number; never used for another link. A connection or frame of another incarnation is refused.
    pub incarnation: u32,
    /// What each end proves to the other.
    pub secret: LinkSecret,
    /// Lanes, 1 to [`Properties::max_lanes`].
    pub lanes: u8,
    /// This end.
    pub side: Side,
}

/// Where written bytes come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Copied at the post, at most [`Properties::max_inline`] bytes; the slice may be reused at once.
    Inline(&'a [u8]),
    /// A range of a registered region, read until the work completes; the region is kept alive until then.
    Region(&'a Region, usize, usize),
}

impl<'a> Source<'a> {
    /// A range of a region.
    #[inline]
    pub fn region(region: &'a Region, range: Range<usize>) -> Self {
        Self::Region(region, range.start, range.len())
    }

    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        match self {
            Self::Inline(bytes) => bytes.len(),
            Self::Region(_, _, len) => *len,
        }
    }

    /// Whether there is nothing to write.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A place in a peer's region.
#[derive(Clone, Copy, Debug)]
pub struct Remote<'a> {
    /// The region.
    pub region: &'a RemoteRegion,
    /// Bytes from its start.
    pub offset: u64,
}

/// A place in a region of this side.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The region.
    pub region: &'a Region,
    /// Bytes from its start.
    pub offset: usize,
    /// Bytes.
    pub len: usize,
}

/// One operation of a chain.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Writes into the peer's region; the peer is not told.
    Write {
        /// What.
        source: Source<'a>,
        /// Where to.
        remote: Remote<'a>,
    },
    /// As `Write`, and then the peer gets [`Completion::Immediate`], after the bytes (and those of earlier writes on
    /// the same lane) are in its memory.
    WriteImmediate {
        /// What; may be empty.
        source: Source<'a>,
        /// Where to; none with an empty source.
        remote: Option<Remote<'a>>,
        /// The 32 bits.
        immediate: u32,
    },
    /// Reads the peer's region into this side's.
    Read {
        /// Where from.
        remote: Remote<'a>,
        /// Where to.
        target: Target<'a>,
    },
    /// Adds to eight bytes of the peer's region, an integer of this machine's byte order, and brings here what they were
    /// before. Fetch-adds of the same eight bytes, through one device of the peer's, happen one after the other; the
    /// peer's own stores keep out of their way only on `shm`. Needs [`Access::PeerWrite`] and [`Properties::fetch_add`].
    FetchAdd {
        /// Where, at a multiple of eight bytes.
        remote: Remote<'a>,
        /// Eight bytes for what was there.
        target: Target<'a>,
        /// What is added, modulo 2⁶⁴.
        add: u64,
    },
}

/// Bytes that [`Op::FetchAdd`] works on.
pub(crate) const FETCH_ADD_BYTES: usize = 8;

/// Refuses a fetch-add that cannot be, whatever the peer has granted.
pub(crate) fn check_fetch_add(remote: &Remote<'_>, target: &Target<'_>) -> Result<(), PostError> {
    if target.len != FETCH_ADD_BYTES {
        return Err(PostError::Invalid(format!("a fetch-add brings {FETCH_ADD_BYTES} bytes, not {}", target.len)));
    }
    if !remote.offset.is_multiple_of(FETCH_ADD_BYTES as u64) {
        let what = format!("a fetch-add at byte {}, which is no multiple of {FETCH_ADD_BYTES}", remote.offset);
        return Err(PostError::Invalid(what));
    }
    Ok(())
}

/// One work request of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// What to do.
    pub op: Op<'a>,
    /// With a token, success too is reported by [`Completion::Sent`]; without, only failure is.
    pub signal: Option<u64>,
}

/// Why work failed. Each ends its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkError {
    /// The peer refused the access: a wrong key, a range outside the region, a right that was not granted, a region
    /// that is no longer granted. The peer's memory was not touched.
    RemoteAccess,
    /// The link ended before the work did; whether it arrived is unknown.
    Flushed,
}

/// Why a link ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disconnect {
    /// The peer closed it in good order.
    Closed,
    /// The peer is gone: its process died, its connection broke, or its host fell silent.
    PeerGone(String),
    /// The connection was not made in time, or was refused.
    NotConnected(String),
    /// The peer could not prove the link secret, or is of another incarnation or version.
    Rejected(String),
    /// One end asked for an access that the other had not granted.
    AccessRefused(String),
    /// The peer broke the provider's protocol.
    Protocol(String),
}

impl fmt::Display for Disconnect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed by the peer"),
            Self::PeerGone(why) => write!(f, "the peer is gone: {why}"),
            Self::NotConnected(why) => write!(f, "not connected: {why}"),
            Self::Rejected(why) => write!(f, "rejected: {why}"),
            Self::AccessRefused(why) => write!(f, "access refused: {why}"),
            Self::Protocol(why) => write!(f, "the peer broke the protocol: {why}"),
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The link is usable. Each end sees it once.
    Connected {
        /// The link.
        link: LinkId,
    },
    /// Signalled work is done (its source may be reused, and its bytes are in the peer's memory or on a reliable way
    /// there, in order, before anything posted later on the lane), or work failed, signalled or not.
    Sent {
        /// The link.
        link: LinkId,
        /// The lane.
        lane: u8,
        /// The work's token; `u64::MAX` for failed work without one.
        token: u64,
        /// Success or the reason.
        result: Result<(), WorkError>,
    },
    /// The peer's write-with-immediate has arrived, bytes first.
    Immediate {
        /// The link.
        link: LinkId,
        /// The lane it came on.
        lane: u8,
        /// The 32 bits.
        immediate: u32,
    },
    /// The link has ended; nothing more comes from it, and no write of the peer reaches this side's memory after it.
    /// Outstanding signalled work was reported `Flushed` before. The link still wants [`Endpoint::close`].
    Disconnected {
        /// The link.
        link: LinkId,
        /// Why.
        reason: Disconnect,
    },
}

/// A completion queue and its links. Owned by one thread, which makes all progress by calling it; no call blocks but
/// [`Endpoint::wait`].
///
/// # Order
/// Work of one lane takes effect in the order of posting, and its immediates arrive in that order. Between lanes there
/// is no order at all.
///
/// # Ends
/// A failed access, a lost lane or a vanished peer ends the whole link, on both sides, and only this link. `Closed`
/// follows a peer's `close`; everything that the peer had posted before it and that the provider had accepted arrives
/// first.
pub trait Endpoint: Send {
    /// Starts a link: reserves its half and returns the descriptor that the other end needs.
    fn open(&mut self, spec: LinkSpec) -> Result<(LinkId, Descriptor), TransportError>;

    /// Connects an opened link to the other half's descriptor. The outcome is a completion (`Connected`, or
    /// `Disconnected` within `timeout`).
    fn connect(&mut self, link: LinkId, peer: &[u8], timeout: Duration) -> Result<(), TransportError>;

    /// Lets the peer of a *connected* link use a region up to `access`, and returns the descriptor to give to it. The
    /// region stays granted (and alive) until the link is closed.
    fn grant(&mut self, link: LinkId, region: &Region, access: Access) -> Result<Descriptor, TransportError>;

    /// Takes up a region that the peer of a connected link has granted; `placement` is used where the provider maps
    /// peer memory.
    fn import(
        &mut self,
        link: LinkId,
        descriptor: &[u8],
        placement: Option<Placement>,
    ) -> Result<RemoteRegion, TransportError>;

    /// Ends a link at once: what was posted may or may not arrive; when the call returns nothing of the peer's reaches
    /// memory that this side will use again, and its grants are withdrawn. A region that was granted with
    /// [`Access::PeerWrite`] over a closed link is the caller's to read and drop, not to grant again: where peers map
    /// memory, the old mapping lives as long as the peer does. No completion of the link follows.
    /// Closing a link that has ended or is unknown does nothing.
    fn close(&mut self, link: LinkId);

    /// Posts a chain to a lane: all of it, in order, or nothing.
    fn post(&mut self, link: LinkId, lane: u8, chain: &[Work<'_>]) -> Result<(), PostError>;

    /// Makes progress without blocking and appends what happened to `completions` (at most about 256 at a call); returns
    /// how many were appended.
    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError>;

    /// Blocks until there may be something to poll, a [`Waker`] wakes it, or `timeout` has passed. May return early.
    fn wait(&mut self, timeout: Duration) -> Result<(), TransportError>;

    /// Wakes this endpoint's `wait` from another thread; a wake before the wait is not lost.
    fn waker(&self) -> Waker;
}

/// What a provider's waker does.
pub trait Wake: Send + Sync {
    /// Makes the endpoint's current or next `wait` return.
    fn wake(&self);
}

/// Wakes an endpoint. Cheap to clone.
#[derive(Clone)]
pub struct Waker(pub Arc<dyn Wake>);

impl Waker {
    /// Makes the endpoint's current or next `wait` return.
    pub fn wake(&self) {
        self.0.wake();
    }
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waker")
    }
}
