//! Members of both sides, joined by a scheduler within the process.

use crate::BenchError;
use crate::transport::own;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{LocalControl, LocalScheduler};
use stepmesh_mesh::scheduler::SchedulerOptions;
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, SlotLayout};
use stepmesh_transport::mem::Fabric;
use stepmesh_transport::{Clock, Device, DeviceOptions, Endpoint, Provider};

const JOIN_SECONDS: u64 = 20;
/// A step of a simulated network while the members join: so small that nobody's patience ends, however slow the machine.
const TICK: Duration = Duration::from_micros(1);

/// A complete deployment, driven by nobody yet.
pub(super) struct Deployment {
    pub(super) attention: Vec<AttentionMesh>,
    pub(super) ffn: Vec<FfnMesh>,
}

impl Deployment {
    /// Makes so many members of both sides and waits until all are linked.
    pub(super) fn join(
        provider: Provider,
        device_options: &DeviceOptions,
        members: [u32; 2],
        layout: &SlotLayout,
    ) -> Result<Self, BenchError> {
        let open = |end| Ok(stepmesh_transport::open(provider, &own(provider, device_options, end))?);
        Self::over(open, Clock::system, || {}, members, layout)
    }

    /// The same over a simulated network and by its clock.
    pub(super) fn simulated(fabric: &Fabric, members: [u32; 2], layout: &SlotLayout) -> Result<Self, BenchError> {
        let numbers = std::cell::Cell::new(0);
        let open = |_| Ok(fabric.device(format!("member {}", numbers.replace(numbers.get() + 1))));
        Self::over(open, || fabric.clock(), || fabric.advance(TICK), members, layout)
    }

    fn over(
        open: impl Fn(usize) -> Result<Arc<dyn Device>, BenchError>,
        clock: impl Fn() -> Clock,
        between: impl Fn(),
        [attention, ffn]: [u32; 2],
        layout: &SlotLayout,
    ) -> Result<Self, BenchError> {
        let scheduler = LocalScheduler::new(SchedulerOptions::new(attention, ffn))?;
        type Parts = (MemberOptions, Arc<dyn Device>, Box<dyn Endpoint>, Box<LocalControl>);
        let parts = |end| -> Result<Parts, BenchError> {
            let device = open(end)?;
            let endpoint = device.endpoint()?;
            let control = Box::new(scheduler.session(endpoint.waker()));
            Ok((MemberOptions::new(layout.clone(), "bench"), device, endpoint, control))
        };
        let attention = (0..attention).map(|_| {
            let (options, device, endpoint, control) = parts(0)?;
            Ok(AttentionMesh::with_endpoint(options, device, endpoint, control, clock())?)
        });
        let attention = attention.collect::<Result<_, BenchError>>()?;
        let ffn = (0..ffn).map(|_| {
            let (options, device, endpoint, control) = parts(1)?;
            Ok(FfnMesh::with_endpoint(options, device, endpoint, control, clock())?)
        });
        let mut deployment = Self { attention, ffn: ffn.collect::<Result<_, BenchError>>()? };
        deployment.complete(between)?;
        Ok(deployment)
    }

    fn complete(&mut self, between: impl Fn()) -> Result<(), BenchError> {
        let deadline = Instant::now() + Duration::from_secs(JOIN_SECONDS);
        loop {
            self.attention.iter_mut().try_for_each(AttentionMesh::poll)?;
            self.ffn.iter_mut().try_for_each(FfnMesh::poll)?;
            between();
            let linked = self.attention.iter().all(|mesh| mesh.is_complete() && mesh.is_linked());
            if linked && self.ffn.iter().all(FfnMesh::is_complete) {
                break;
            }
            if Instant::now() > deadline {
                return Err(BenchError::NotConnected(JOIN_SECONDS));
            }
        }
        self.attention.iter_mut().for_each(|mesh| while mesh.next_event().is_some() {});
        self.ffn.iter_mut().for_each(|mesh| while mesh.next_event().is_some() {});
        Ok(())
    }
}
