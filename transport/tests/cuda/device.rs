//! A provider's device with a GPU beside it: its payloads are device memory where peers can open that, pinned memory else.

use crate::double::{allocated, context, fail, finish, host, whole, with_double, with_driver};
use cudarc::driver::sys::CUresult;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_transport::cuda::{CudaError, DeviceMemory, PinnedMemory, Span, Stream, beside};
use stepmesh_transport::{
    Access, AddressSpace, Completion, Device, DeviceOptions, Endpoint, LinkId, LinkSecret, LinkSpec, Op, Placement,
    PostError, Provider, Region, Remote, Side, Source, TransportError, Work,
};

const AREA: usize = 64 * 1024;

/// Two connected ends on devices beside one GPU.
struct Pair {
    device: Arc<dyn Device>,
    ends: [Box<dyn Endpoint>; 2],
    links: [LinkId; 2],
    told: [Vec<Completion>; 2],
    incarnation: u32,
}

impl Pair {
    fn new(provider: Provider) -> Self {
        let device = beside(&context(), stepmesh_transport::open(provider, &DeviceOptions::default()).unwrap());
        let ends = [0, 1].map(|_| device.endpoint().unwrap());
        let mut pair = Self { device, ends, links: [LinkId(0); 2], told: [Vec::new(), Vec::new()], incarnation: 0 };
        pair.link();
        pair
    }

    /// Links the ends anew.
    fn link(&mut self) {
        self.incarnation += 1;
        let spec = |side| LinkSpec { incarnation: self.incarnation, secret: LinkSecret([7; 16]), lanes: 1, side };
        let [a, b] = &mut self.ends;
        let (first, offer_a) = a.open(spec(Side::Active)).unwrap();
        let (second, offer_b) = b.open(spec(Side::Passive)).unwrap();
        a.connect(first, &offer_b, Duration::from_secs(10)).unwrap();
        b.connect(second, &offer_a, Duration::from_secs(10)).unwrap();
        self.links = [first, second];
        for end in [0, 1] {
            self.until(end, |completion| matches!(completion, Completion::Connected { .. }));
        }
    }

    /// Until an end has been told so; what it was told before is forgotten.
    fn until(&mut self, end: usize, is_it: impl Fn(&Completion) -> bool) {
        let started = Instant::now();
        loop {
            for (endpoint, told) in self.ends.iter_mut().zip(&mut self.told) {
                endpoint.poll(told).unwrap();
            }
            if let Some(found) = self.told[end].iter().position(&is_it) {
                self.told[end].drain(..=found);
                return;
            }
            assert!(started.elapsed().as_secs() < 30, "{:?}", self.told);
        }
    }

    fn close(&mut self) {
        for (end, link) in self.ends.iter_mut().zip(self.links) {
            end.close(link);
        }
    }

    /// End 0 grants; what end 1 makes of it, once it has come.
    fn share(&mut self, region: &Region, access: Access) -> Result<stepmesh_transport::RemoteRegion, TransportError> {
        let descriptor = self.ends[0].grant(self.links[0], region, access)?;
        self.ends[1].import(self.links[1], &descriptor, None)
    }
}

#[test]
fn a_peer_reads_and_produces_in_device_memory_and_only_what_it_may() {
    with_driver("device::a_peer_reads_and_produces_in_device_memory_and_only_what_it_may", || {
        let mut pair = Pair::new(Provider::Shm);
        assert!(!pair.device.places_payloads());
        let stream = Stream::new(&context()).unwrap();
        let region = pair.device.allocate_payload(AREA, Access::PeerWrite, None).unwrap();
        assert!(region.on_device() && region.len() >= AREA);

        let writable = pair.share(&region, Access::PeerWrite).unwrap();
        let mapped = writable.mapped.clone().unwrap();
        assert!(mapped.on_device() && mapped.writable() && writable.len as usize == region.len());
        stream.copy(&whole(&host(b"reply")), &Span::new(&mapped, 0..5).unwrap()).unwrap();
        let back = host(&[0; 5]);
        stream.copy(&Span::new(&region, 0..5).unwrap(), &whole(&back)).unwrap();
        finish(&stream);
        let mut found = [0; 5];
        back.read(0, &mut found).unwrap();
        assert_eq!(&found, b"reply");

        let read_only = pair.share(&region, Access::PeerRead).unwrap().mapped.unwrap();
        let refused = stream.copy(&whole(&host(b"reply")), &Span::new(&read_only, 0..5).unwrap());
        assert!(matches!(refused, Err(CudaError::Invalid(_))), "{refused:?}");

        let shared = pair.device.allocate_payload(AREA, Access::PeerRead, None).unwrap();
        assert!(pair.share(&shared, Access::PeerWrite).is_err(), "more than it was allocated for");
        let remote = Remote { region: &writable, offset: 0 };
        let write = Work { op: Op::Write { source: Source::Inline(b"x"), remote }, signal: None };
        let refused = pair.ends[1].post(pair.links[1], 0, &[write]).unwrap_err();
        assert!(matches!(refused, PostError::Unsupported { .. }) && refused.to_string().contains("device memory"));

        // What is not device memory goes its usual way.
        let plain = pair.device.allocate(4096, Access::PeerWrite, None).unwrap();
        let descriptor = pair.ends[0].grant(pair.links[0], &plain, Access::PeerWrite).unwrap();
        let remote = pair.ends[1].import(pair.links[1], &descriptor, None).unwrap();
        let place = Some(Remote { region: &remote, offset: 8 });
        let op = Op::WriteImmediate { source: Source::Inline(b"header"), remote: place, immediate: 9 };
        pair.ends[1].post(pair.links[1], 0, &[Work { op, signal: None }]).unwrap();
        pair.until(0, |completion| matches!(completion, Completion::Immediate { immediate: 9, .. }));
        let mut header = [0; 6];
        plain.read(8, &mut header).unwrap();
        assert_eq!(&header, b"header");
    });
}

#[test]
fn memory_that_a_peer_was_granted_is_neither_freed_nor_given_out_again_while_the_device_is() {
    with_double(
        "device::memory_that_a_peer_was_granted_is_neither_freed_nor_given_out_again_while_the_device_is",
        || {
            let mut pair = Pair::new(Provider::Shm);
            let mut bases = Vec::new();
            for links in 1..=3 {
                let region = pair.device.allocate_payload(AREA, Access::PeerWrite, None).unwrap();
                let private = pair.device.allocate_payload(AREA, Access::PeerWrite, None).unwrap();
                let remote = pair.share(&region, Access::PeerWrite).unwrap();
                assert!(!bases.contains(&region.base()), "a former peer may write there");
                bases.push(region.base());
                drop((region, private));
                pair.close();
                drop(remote);
                assert_eq!(allocated(), links * (2 << 20), "what nobody was granted is freed");
                pair.link();
            }
            drop(pair);
            assert_eq!(allocated(), 0);
        },
    );
}

#[test]
fn device_memory_has_no_place_and_damaged_descriptors_are_refused() {
    with_driver("device::device_memory_has_no_place_and_damaged_descriptors_are_refused", || {
        let mut pair = Pair::new(Provider::Shm);
        let space = AddressSpace::reserve(AREA).unwrap();
        let place = || Some(Placement::take(&space, 0, AREA).unwrap());
        assert!(pair.device.allocate_payload(AREA, Access::PeerWrite, place()).is_err());
        let region = pair.device.allocate_payload(AREA, Access::PeerWrite, None).unwrap();
        let descriptor = pair.ends[0].grant(pair.links[0], &region, Access::PeerWrite).unwrap();
        let link = pair.links[1];
        assert!(pair.ends[1].import(link, &descriptor, place()).is_err());
        for len in 0..descriptor.len() {
            assert!(pair.ends[1].import(link, &descriptor[..len], None).is_err(), "{len} bytes");
        }
        // Access, process, size: nothing of it is believed.
        for at in [8, 9, 12, 15, descriptor.len() - 8, descriptor.len() - 1] {
            let mut damaged = descriptor.clone();
            damaged[at] ^= 0x40;
            let refused = pair.ends[1].import(link, &damaged, None).unwrap_err();
            let is_typed =
                matches!(refused, TransportError::Descriptor { .. } | TransportError::Cuda(CudaError::Peer { .. }));
            assert!(is_typed, "byte {at}: {refused}");
        }
        drop((region, pair));
        let mut other = Pair::new(Provider::Shm);
        assert!(matches!(
            other.ends[1].import(other.links[1], &descriptor, None),
            Err(TransportError::Descriptor { .. })
        ));
    });
}

#[test]
fn where_the_cpu_moves_the_bytes_payloads_are_pinned() {
    with_double("device::where_the_cpu_moves_the_bytes_payloads_are_pinned", || {
        let mut pair = Pair::new(Provider::Tcp);
        assert!(pair.device.places_payloads());
        let stream = Stream::new(&context()).unwrap();
        let [sent, landed] = [0, 1].map(|_| pair.device.allocate_payload(AREA, Access::PeerWrite, None).unwrap());
        assert!(!sent.on_device() && allocated() == 0);
        let tensor = Region::new(DeviceMemory::allocate(&context(), 8).unwrap());
        stream.copy(&whole(&host(b"8 bytes.")), &Span::new(&tensor, 0..8).unwrap()).unwrap();
        stream.copy(&Span::new(&tensor, 0..8).unwrap(), &Span::new(&sent, 0..8).unwrap()).unwrap();
        finish(&stream);

        // End 1 writes into what end 0 has granted.
        let remote = pair.share(&landed, Access::PeerWrite).unwrap();
        let place = Some(Remote { region: &remote, offset: 16 });
        let op = Op::WriteImmediate { source: Source::Region(&sent, 0, 8), remote: place, immediate: 3 };
        pair.ends[1].post(pair.links[1], 0, &[Work { op, signal: None }]).unwrap();
        pair.until(0, |completion| matches!(completion, Completion::Immediate { immediate: 3, .. }));
        let mut found = [0; 8];
        landed.read(16, &mut found).unwrap();
        assert_eq!(&found, b"8 bytes.");
        drop((pair, sent, remote));
        // Locked once only: this would fail if the first had not been let go.
        fail("cuMemHostRegister_v2", CUresult::CUDA_ERROR_OUT_OF_MEMORY, 1);
        let device = beside(&context(), stepmesh_transport::open(Provider::Tcp, &DeviceOptions::default()).unwrap());
        let refused = device.allocate_payload(AREA, Access::PeerWrite, None).unwrap_err();
        assert!(
            matches!(refused, TransportError::Cuda(CudaError::Refused { call: "cuMemHostRegister", .. })),
            "{refused}"
        );
        assert!(PinnedMemory::pin(&context(), tensor).is_err(), "device memory needs none");
    });
}
