//! Memory and how it is refused: device memory, the limit of locked memory, on-demand paging.

use super::{Verbs, open};
use std::process::Command;
use std::sync::Arc;
use stepmesh_transport::testing::{self, DeviceMemory, MappedFile};
use stepmesh_transport::verbs::VerbsOptions;
use stepmesh_transport::{Access, TransportError};

const LEN: usize = 1 << 20;

/// Soft-RoCE knows neither dma-buf nor a peer-memory module, and an adapter knows no such address.
#[test]
fn explains_what_device_memory_needs() {
    let fixture = fixture!(VerbsOptions::default());
    let device = fixture.open(&fixture.names[..1]);
    let file = rustix::fs::memfd_create("no-dma-buf", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, LEN as u64).unwrap();
    let exported = DeviceMemory::new(LEN).exported_as(file);
    let error = device.register(Arc::new(exported), Access::PeerWrite).unwrap_err();
    let TransportError::Registration { device: name, bytes, hint, .. } = &error else { panic!("{error:?}") };
    assert_eq!((name, *bytes), (&fixture.names[0], LEN));
    assert!(hint.contains("dma-buf") && hint.contains("and as peer memory"), "{error}");
    let error = device.register(Arc::new(DeviceMemory::new(LEN)), Access::PeerWrite).unwrap_err();
    let TransportError::Registration { memory, hint, .. } = &error else { panic!("{error:?}") };
    assert!(memory.contains("has no dma-buf") && hint.contains("nvidia_peermem"), "{error}");
}

#[test]
fn refuses_a_dma_buf_that_is_too_short() {
    let fixture = fixture!(VerbsOptions::default());
    let file = rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, LEN as u64 / 2).unwrap();
    let memory = Arc::new(DeviceMemory::new(LEN).exported_as(file));
    let error = fixture.open(&fixture.names[..1]).register(memory, Access::Local).unwrap_err();
    assert!(matches!(&error, TransportError::Invalid { what } if what.contains("of a dma-buf of 524288")), "{error:?}");
}

const LIMITED: &str = "STEPMESH_TEST_LIMIT_LOCKED_MEMORY";

/// In a process of its own, which gives up the right to lock more than its limit.
#[test]
fn explains_the_limit_of_locked_memory() {
    let fixture = fixture!(VerbsOptions::default());
    if std::env::var_os(LIMITED).is_none() {
        let this = ["memory::explains_the_limit_of_locked_memory", "--exact", "--nocapture"];
        let status = Command::new(std::env::current_exe().unwrap()).args(this).env(LIMITED, "1").status().unwrap();
        assert!(status.success(), "{status}");
        return;
    }
    // Before the capability goes: what an endpoint needs is not the matter here.
    let device = fixture.open(&fixture.names[..1]);
    let limit = rustix::process::Rlimit { current: Some(256 << 10), maximum: Some(256 << 10) };
    rustix::process::setrlimit(rustix::process::Resource::Memlock, limit).unwrap();
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(rustix::thread::CapabilitySet::IPC_LOCK);
    rustix::thread::set_capabilities(None, sets).unwrap();
    let few = device.allocate(64 << 10, Access::Local, None).unwrap();
    let errors = [
        device.allocate(LEN, Access::Local, None).map(|_| ()).unwrap_err(),
        device.register(Arc::new(MappedFile::new(LEN)), Access::PeerWrite).map(|_| ()).unwrap_err(),
    ];
    for error in errors {
        let TransportError::Registration { bytes: LEN, hint, .. } = &error else { panic!("{error:?}") };
        assert!(hint.contains("256 KiB") && hint.contains("ulimit -l unlimited"), "{error}");
    }
    drop(few);
    device.allocate(128 << 10, Access::Local, None).expect("what was locked is free again");
}

/// Where the device does it, it works; else it is refused when the device is opened, with what to do.
#[test]
fn on_demand_paging_is_refused_where_the_device_lacks_it() {
    let mut fixture = fixture!(VerbsOptions::default());
    let options = VerbsOptions { on_demand_paging: true, ..Default::default() };
    match open(VerbsOptions { devices: fixture.names[..1].to_vec(), ..options.clone() }) {
        Ok(_) => {
            fixture.options = options;
            testing::writes_a_whole_region_at_once(&mut fixture);
        }
        Err(error) => {
            let hinted =
                matches!(&error, TransportError::Registration { hint, .. } if hint.contains("on_demand_paging"));
            assert!(hinted, "{error:?}");
        }
    }
}

#[test]
fn keeps_the_promises_with_relaxed_ordering() {
    let mut fixture = fixture!(VerbsOptions { relaxed_ordering: true, ..Default::default() });
    testing::delivers_bytes_before_their_immediate(&mut fixture);
    testing::lets_peers_reach_memory_of_the_caller(&mut fixture);
}
