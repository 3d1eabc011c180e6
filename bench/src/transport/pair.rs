//! Two connected ends of a provider, each with memory that the other may write.

use super::{Mode, pingpong};
use crate::timing::Timing;
use crate::{BenchError, Cpus};
use std::io;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};
use stepmesh_transport::{
    Access, Completion, Device, DeviceOptions, Endpoint, LinkId, LinkSecret, LinkSpec, Op, PostError, Provider, Region,
    Remote, RemoteRegion, Side, Source, Work, verbs,
};

const CONNECT_SECONDS: u64 = 10;
/// The immediate of a check, told apart from what a measurement may have left behind.
const CHECK: u32 = 0xc4ec;

/// How many transfers of a stream are under way at most, each in a place of its own.
pub(crate) fn window(bytes: usize) -> usize {
    ((1 << 20) / bytes.max(1)).clamp(4, 16)
}

/// See the module.
pub(crate) struct Pair {
    pub(crate) provider: Provider,
    pub(super) ends: [End; 2],
    /// The RDMA devices of the ends.
    pub(crate) rdma_devices: [String; 2],
}

/// One end. Apart from its neighbour, so that the two share no cache line.
#[repr(align(128))]
pub(crate) struct End {
    device: Arc<dyn Device>,
    endpoint: Box<dyn Endpoint>,
    link: LinkId,
    seen: Vec<Completion>,
    /// How many of `seen` were looked at.
    looked_at: usize,
    /// What is sent.
    pub(crate) source: Region,
    /// Where the peer's bytes land.
    landing: Region,
    /// Where this end's bytes go.
    pub(crate) target: RemoteRegion,
}

impl Pair {
    /// Opens two devices, connects them, and lets each end write into the other's memory.
    pub(crate) fn connect(provider: Provider, options: &DeviceOptions, sizes: &[usize]) -> Result<Self, BenchError> {
        let largest = sizes.iter().copied().max().unwrap_or(0);
        let landing = sizes.iter().map(|&bytes| bytes * window(bytes)).max().unwrap_or(0).max(64);
        let mut secret = [0; 16];
        getrandom::fill(&mut secret)
            .map_err(|error| io::Error::other(error.to_string()))
            .map_err(BenchError::system("drawing a link secret"))?;
        let own = [0, 1].map(|end| own(provider, options, end));
        let rdma_devices = own.each_ref().map(|options| options.verbs.devices.first().cloned().unwrap_or_default());
        let open = |side| {
            let device = stepmesh_transport::open(provider, &own[usize::from(side == Side::Passive)])?;
            let mut endpoint = device.endpoint()?;
            let (link, descriptor) =
                endpoint.open(LinkSpec { incarnation: 1, secret: LinkSecret(secret), lanes: 1, side })?;
            Ok::<_, BenchError>(((device, endpoint, link), descriptor))
        };
        let (mut active, of_active) = open(Side::Active)?;
        let (mut passive, of_passive) = open(Side::Passive)?;
        let timeout = Duration::from_secs(CONNECT_SECONDS);
        passive.1.connect(passive.2, &of_active, timeout)?;
        active.1.connect(active.2, &of_passive, timeout)?;
        let deadline = Instant::now() + timeout;
        let mut connected = [false; 2];
        while connected != [true; 2] {
            for ((_, endpoint, _), connected) in [&mut active, &mut passive].into_iter().zip(&mut connected) {
                let mut seen = Vec::new();
                endpoint.poll(&mut seen)?;
                for completion in seen {
                    match completion {
                        Completion::Connected { .. } => *connected = true,
                        Completion::Disconnected { reason, .. } => return Err(BenchError::Ended(reason)),
                        _ => {}
                    }
                }
            }
            if Instant::now() > deadline {
                return Err(BenchError::NotConnected(CONNECT_SECONDS));
            }
        }
        let grant = |(device, endpoint, link): &mut (Arc<dyn Device>, Box<dyn Endpoint>, LinkId)| {
            let region = device.allocate(landing, Access::PeerWrite, None)?;
            let descriptor = endpoint.grant(*link, &region, Access::PeerWrite)?;
            Ok::<_, BenchError>((region, descriptor))
        };
        let (at_active, granted_by_active) = grant(&mut active)?;
        let (at_passive, granted_by_passive) = grant(&mut passive)?;
        let end =
            |(device, mut endpoint, link): (Arc<dyn Device>, Box<dyn Endpoint>, LinkId), landing, granted: &[u8]| {
                let target = endpoint.import(link, granted, None)?;
                let source = device.allocate(largest.max(64), Access::Local, None)?;
                Ok::<_, BenchError>(End {
                    device,
                    endpoint,
                    link,
                    seen: Vec::with_capacity(1024),
                    looked_at: 0,
                    source,
                    landing,
                    target,
                })
            };
        let ends = [end(active, at_active, &granted_by_passive)?, end(passive, at_passive, &granted_by_active)?];
        Ok(Self { provider, ends, rdma_devices })
    }

    /// Round trips of so many bytes each way: by writes-with-immediate, or by plain ones, of which both ends poll memory.
    pub(crate) fn round_trip(
        &mut self,
        plain: bool,
        mode: Mode,
        bytes: usize,
        cpus: Cpus,
        budget: Duration,
    ) -> Result<Timing, BenchError> {
        if plain {
            pingpong::play_plain(self, cpus, bytes, budget)
        } else {
            pingpong::play(self, cpus, mode, bytes, budget)
        }
    }

    /// Sends a pattern each way and compares what arrives.
    pub(super) fn check(&mut self, mode: Mode, bytes: usize) -> Result<(), BenchError> {
        let over = AtomicBool::new(false);
        let provider = self.provider.name();
        for (from, seed) in [(0, 1u8), (1, 2)] {
            let pattern: Vec<u8> = (0..bytes).map(|i| (i / 251 + i) as u8 ^ seed).collect();
            let [a, b] = &mut self.ends;
            let (sender, receiver) = if from == 0 { (a, b) } else { (b, a) };
            produced(mode, &sender.source, &sender.target).write(0, &pattern)?;
            let deadline = Instant::now() + Duration::from_secs(CONNECT_SECONDS);
            sender.send(mode, bytes, 0, CHECK)?;
            loop {
                match receiver.look(&over)? {
                    Some(CHECK) => break,
                    Some(stray) => return Err(BenchError::Stray { stray, provider }),
                    None => {}
                }
                // Large messages need the sender's help.
                sender.progress()?;
                if Instant::now() > deadline {
                    return Err(BenchError::Damaged { bytes, provider });
                }
            }
            let mut arrived = vec![0; bytes];
            receiver.landing.read(0, &mut arrived)?;
            if arrived != pattern {
                return Err(BenchError::Damaged { bytes, provider });
            }
        }
        Ok(())
    }
}

/// The options of one end. Where nothing says otherwise, the two ends of RDMA are the first two devices.
pub(crate) fn own(provider: Provider, options: &DeviceOptions, end: usize) -> DeviceOptions {
    let mut options = options.clone();
    if provider == Provider::Verbs && options.verbs.devices.is_empty() {
        let names = verbs::device_names().unwrap_or_default();
        let last = names.len().saturating_sub(1);
        options.verbs.devices.extend(names.into_iter().nth(last.min(end)));
    }
    options
}

impl End {
    /// Memory of this end's device that no peer is to see.
    pub(crate) fn allocate(&self, bytes: usize, access: Access) -> Result<Region, BenchError> {
        Ok(self.device.allocate(bytes, access, None)?)
    }

    /// Writes `bytes` to `place` of the peer's memory, with an immediate.
    #[inline]
    pub(super) fn send(&mut self, mode: Mode, bytes: usize, place: usize, immediate: u32) -> Result<(), BenchError> {
        let start = match mode {
            Mode::Copy => 0,
            Mode::InPlace => place,
        };
        let source = Source::region(produced(mode, &self.source, &self.target), start..start + bytes);
        let remote = Some(Remote { region: &self.target, offset: place as u64 });
        let work = Work { op: Op::WriteImmediate { source, remote, immediate }, signal: None };
        post(&mut *self.endpoint, self.link, &mut self.seen, &work)
    }

    /// Does a work that was prepared beforehand.
    #[inline]
    pub(super) fn post(&mut self, work: &Work<'_>) -> Result<(), BenchError> {
        post(&mut *self.endpoint, self.link, &mut self.seen, work)
    }

    /// What plain writes take place in.
    pub(super) fn memory(&self) -> Memory {
        Memory { source: self.source.clone(), landing: self.landing.clone(), target: self.target.clone() }
    }

    /// Sends a bare immediate.
    pub(super) fn notify(&mut self, immediate: u32) -> Result<(), BenchError> {
        self.send(Mode::Copy, 0, 0, immediate)
    }

    /// Polls, and keeps what comes for [`End::look`].
    #[inline]
    fn progress(&mut self) -> Result<usize, BenchError> {
        Ok(self.endpoint.poll(&mut self.seen)?)
    }

    /// Waits for something to come, so long at most.
    pub(super) fn rest(&mut self, time: Duration) -> Result<(), BenchError> {
        Ok(self.endpoint.wait(time)?)
    }

    /// Polls until the other end is `over`: it may still need this one to send and to acknowledge.
    pub(super) fn attend(&mut self, over: &AtomicBool) -> Result<(), BenchError> {
        while !over.load(Ordering::Acquire) {
            self.seen.clear();
            self.progress()?;
            std::hint::spin_loop();
        }
        self.seen.clear();
        self.looked_at = 0;
        Ok(())
    }

    /// The next immediate, if one has come; an error once the other end is `over`.
    #[inline]
    pub(super) fn look(&mut self, over: &AtomicBool) -> Result<Option<u32>, BenchError> {
        loop {
            if let Some(completion) = self.seen.get(self.looked_at) {
                self.looked_at += 1;
                match completion {
                    Completion::Immediate { immediate, .. } => return Ok(Some(*immediate)),
                    Completion::Disconnected { reason, .. } => return Err(BenchError::Ended(reason.clone())),
                    Completion::Connected { .. } | Completion::Sent { .. } => continue,
                }
            }
            self.seen.clear();
            self.looked_at = 0;
            if self.progress()? == 0 {
                if !over.load(Ordering::Acquire) {
                    return Ok(None);
                }
                // What it sent before it left may have come since.
                if self.progress()? == 0 {
                    return Err(BenchError::Stopped);
                }
            }
        }
    }

    /// Spins until an immediate comes.
    #[inline]
    pub(super) fn receive(&mut self, over: &AtomicBool) -> Result<u32, BenchError> {
        loop {
            if let Some(immediate) = self.look(over)? {
                return Ok(immediate);
            }
        }
    }
}

/// The memory of an end.
pub(super) struct Memory {
    source: Region,
    landing: Region,
    target: RemoteRegion,
}

impl Memory {
    /// A write of the first `bytes` to the begin of the peer's memory, which nobody is told of.
    pub(super) fn write(&self, bytes: usize) -> Work<'_> {
        let source = Source::region(&self.source, 0..bytes);
        Work { op: Op::Write { source, remote: Remote { region: &self.target, offset: 0 } }, signal: None }
    }

    /// The byte that such a write moves last: here, and of what the peer writes.
    pub(super) fn flags(&self, bytes: usize) -> Result<[&AtomicU8; 2], BenchError> {
        Ok([byte(&self.source, bytes - 1)?, byte(&self.landing, bytes - 1)?])
    }
}

/// A byte of a region, as memory that others write or read at the same time.
fn byte(region: &Region, offset: usize) -> Result<&AtomicU8, BenchError> {
    let place = region.at(offset..offset + 1)?;
    // SAFETY: one byte of a region that lives as long as the borrow; the device stores it as a whole.
    Ok(unsafe { AtomicU8::from_ptr(place.as_ptr()) })
}

/// Posts, as soon as there is room.
#[inline]
fn post(
    endpoint: &mut dyn Endpoint,
    link: LinkId,
    seen: &mut Vec<Completion>,
    work: &Work<'_>,
) -> Result<(), BenchError> {
    loop {
        match endpoint.post(link, 0, slice::from_ref(work)) {
            Ok(()) => return Ok(()),
            Err(PostError::WouldBlock) => endpoint.poll(seen).map(drop)?,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Where an end produces what it sends.
#[inline]
fn produced<'a>(mode: Mode, source: &'a Region, target: &'a RemoteRegion) -> &'a Region {
    match (mode, &target.mapped) {
        (Mode::InPlace, Some(mapped)) => mapped,
        _ => source,
    }
}
