//! A shm link that is gone leaves nothing behind: no descriptor, no mapping, no file. Alone in its process, because it
//! counts what the process holds.

use std::time::Duration;
use stepmesh_transport::testing::{A, B, Fixture, World, write};
use stepmesh_transport::{Access, Device, DeviceOptions, Provider};

struct Shm;

impl Fixture for Shm {
    fn device(&mut self) -> std::sync::Arc<dyn Device> {
        stepmesh_transport::open(Provider::Shm, &DeviceOptions::default()).expect("a shm device")
    }
}

/// Open descriptors, mappings of this provider's memory, and files in `/dev/shm`.
fn held() -> [usize; 3] {
    let entries = |path: &str| std::fs::read_dir(path).map_or(0, |entries| entries.count());
    let maps = std::fs::read_to_string("/proc/self/maps").expect("the mappings of this process");
    let mappings = maps.lines().filter(|line| line.contains("memfd:stepmesh-")).count();
    [entries("/proc/self/fd"), mappings, entries("/dev/shm")]
}

fn live_and_let_go(leave: fn(&mut World<'_>, stepmesh_transport::testing::Link)) {
    let mut fixture = Shm;
    let mut world = World::new(&mut fixture);
    for lanes in [1, 8] {
        let link = world.link(lanes);
        let target = world.grant(link, B, 10_000, Access::PeerWrite);
        let source = world.ends[A].source(1, 10_000);
        world.perform(A, link, write(&source, 0..10_000, &target.remote, 0));
        leave(&mut world, link);
    }
}

#[test]
fn links_leave_nothing_behind() {
    let before = held();
    assert_eq!(before[1], 0);
    live_and_let_go(|_, _| {});
    assert_eq!(held(), before, "after dropping the endpoints");
    live_and_let_go(|world, link| {
        let during = held();
        world.ends[A].endpoint.close(link.0[A]);
        world.until("the end is seen", |ends| ends[B].ended(link.0[B]).is_some());
        world.ends[B].endpoint.close(link.0[B]);
        world.linger(Duration::from_millis(1));
        let after = held();
        assert!(after[0] < during[0] && after[1] < during[1], "after closing: {during:?}, then {after:?}");
    });
    assert_eq!(held(), before, "after closing the links");
}
