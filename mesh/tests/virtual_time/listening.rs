//! What the scheduler says is heard before anybody sleeps.

use crate::world::Shape;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use stepmesh_mesh::control::{Control, ControlError, ControlEvent};
use stepmesh_mesh::{AttentionMesh, MemberOptions, MeshEvent};
use stepmesh_proto::control::{Epoch, FromMember, ToMember, to_member};
use stepmesh_transport::{
    Access, Clock, Completion, Descriptor, Endpoint, LinkId, LinkSpec, Placement, PostError, Region, RemoteRegion,
    TransportError, Waker, Work, mem,
};

/// What comes next, and how often the member has slept.
#[derive(Clone, Default)]
struct Script {
    completions: Arc<Mutex<Vec<Completion>>>,
    said: Arc<Mutex<VecDeque<ControlEvent>>>,
    waits: Arc<AtomicU32>,
}

impl Control for Script {
    fn send(&mut self, _: FromMember) -> Result<(), ControlError> {
        Ok(())
    }

    fn poll(&mut self) -> Option<ControlEvent> {
        self.said.lock().unwrap().pop_front()
    }
}

/// An endpoint without links.
struct Scripted(Script, Waker);

impl Endpoint for Scripted {
    fn open(&mut self, _: LinkSpec) -> Result<(LinkId, Descriptor), TransportError> {
        unreachable!()
    }
    fn connect(&mut self, _: LinkId, _: &[u8], _: Duration) -> Result<(), TransportError> {
        unreachable!()
    }
    fn grant(&mut self, _: LinkId, _: &Region, _: Access) -> Result<Descriptor, TransportError> {
        unreachable!()
    }
    fn import(&mut self, _: LinkId, _: &[u8], _: Option<Placement>) -> Result<RemoteRegion, TransportError> {
        unreachable!()
    }
    fn close(&mut self, _: LinkId) {}
    fn post(&mut self, link: LinkId, _: u8, _: &[Work<'_>]) -> Result<(), PostError> {
        Err(PostError::NotConnected(link))
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError> {
        let mut here = self.0.completions.lock().unwrap();
        let count = here.len();
        completions.append(&mut here);
        Ok(count)
    }

    fn wait(&mut self, _: Duration) -> Result<(), TransportError> {
        self.0.waits.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn waker(&self) -> Waker {
        self.1.clone()
    }
}

#[test]
fn a_member_does_not_sleep_while_the_scheduler_may_have_said_something_that_a_completion_came_with() {
    let (clock, script) = (Clock::manual(), Script::default());
    let device = mem::Fabric::new(mem::FabricOptions::default()).device("attention");
    let endpoint = Box::new(Scripted(script.clone(), device.endpoint().unwrap().waker()));
    let options = MemberOptions::new(Shape::new(1, 1).layout(), "echo");
    let control = Box::new(script.clone());
    let mut mesh = AttentionMesh::with_endpoint(options, device, endpoint, control, clock.clone()).unwrap();
    let deadline = clock.now() + Duration::from_secs(60);
    // Both are there when it is woken, once; it looks at the completion first.
    script.completions.lock().unwrap().push(Completion::Connected { link: LinkId(7) });
    let epoch = to_member::Body::Epoch(Epoch { epoch: 3, complete: true, ..Epoch::default() });
    script.said.lock().unwrap().push_back(ControlEvent::Message(ToMember { body: Some(epoch) }));
    for _ in 0..2 {
        mesh.poll().unwrap();
        mesh.sleep(deadline).unwrap();
    }
    assert_eq!(mesh.next_event(), Some(MeshEvent::Epoch { epoch: 3, complete: true }));
    assert_eq!(script.waits.load(Ordering::Relaxed), 1, "it slept before it had heard the scheduler, or not at all");
}
