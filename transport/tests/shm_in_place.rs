//! What was produced in a mapped slot is sent without a look at it: a push of 8 bytes and one of 1.75 MiB do the same.
//! Shown by taking all access to the bytes away while they are sent. Alone in its process, which a touch would kill.

use rustix::mm::{MprotectFlags, mprotect};
use stepmesh_transport::testing::{A, B, Fixture, World, write_immediate};
use stepmesh_transport::{Access, Device, DeviceOptions, Provider, Region};

struct Shm;

impl Fixture for Shm {
    fn device(&mut self) -> std::sync::Arc<dyn Device> {
        stepmesh_transport::open(Provider::Shm, &DeviceOptions::default()).expect("a shm device")
    }
}

fn protect(region: &Region, access: MprotectFlags) {
    // SAFETY: a whole mapping of its own, to which nobody holds a reference.
    unsafe { mprotect(region.base().as_ptr().cast(), region.len(), access) }.expect("mprotect");
}

#[test]
fn bytes_that_were_produced_in_place_are_not_touched_when_they_are_sent() {
    let mut fixture = Shm;
    let (mut world, link) = World::connected(&mut fixture, 1);
    let len = 1792 << 10;
    let target = world.grant(link, B, len, Access::PeerWrite);
    let mapped = target.remote.mapped.clone().expect("shm maps");
    for (number, len) in [8, 7 << 10, len].into_iter().enumerate() {
        let bytes = vec![number as u8 + 1; len];
        mapped.write(0, &bytes).expect("in bounds");
        protect(&mapped, MprotectFlags::empty());
        world.post(A, link, 0, write_immediate(&mapped, 0..len, &target.remote, 0, number as u32), None);
        protect(&mapped, MprotectFlags::READ | MprotectFlags::WRITE);
        world.until("it arrives", |ends| ends[B].immediates(link.0[B]).len() == number + 1);
        assert!(target.bytes(0..len) == bytes);
    }
}
