//! The steady state of a verbs link allocates nothing and, while it spins, makes one system call a chain and no other:
//! counted thread by thread, the allocations by an allocator and the calls by `strace`. Passes with a line that says so
//! where there is no RDMA device.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;
use stepmesh_transport::testing::{A, B, Fixture, Granted, Link, World, notify, write_immediate};
use stepmesh_transport::{Access, Completion, Device, DeviceOptions, Provider, Region, Work, verbs};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Devices whose endpoints spin for as long as given.
struct Verbs {
    spin: Duration,
}

impl Fixture for Verbs {
    fn device(&mut self) -> std::sync::Arc<dyn Device> {
        let options = DeviceOptions { spin: self.spin, ..DeviceOptions::default() };
        stepmesh_transport::open(Provider::Verbs, &options).expect("an RDMA device")
    }
}

fn has_devices() -> bool {
    if let Err(why) = verbs::device_names() {
        assert!(std::env::var_os("STEPMESH_REQUIRE_RDMA").is_none(), "{why}");
        println!("skipped: {why}");
        return false;
    }
    true
}

/// Two lanes, on each of which a chain of two immediates comes in a round.
struct Rounds<'f> {
    world: World<'f>,
    link: Link,
    target: Granted,
    source: Region,
    seen: Vec<Completion>,
}

const CHAINS: usize = 2;

impl<'f> Rounds<'f> {
    fn new(fixture: &'f mut Verbs) -> Self {
        let (mut world, link) = World::connected(fixture, CHAINS as u8);
        let target = world.grant(link, B, 256, Access::PeerWrite);
        let source = world.ends[A].source(1, 256);
        Self { world, link, target, source, seen: Vec::with_capacity(1024) }
    }

    fn round(&mut self, number: u32) {
        let ends = &mut self.world.ends;
        for lane in 0..CHAINS as u8 {
            let write = write_immediate(&self.source, 0..256, &self.target.remote, 0, number);
            let chain = [Work { op: write, signal: Some(1) }, Work { op: notify(2), signal: None }];
            ends[A].endpoint.post(self.link.0[A], lane, &chain).unwrap();
        }
        while self.seen.len() < CHAINS * 3 {
            for end in ends.iter_mut() {
                end.endpoint.poll(&mut self.seen).unwrap();
            }
            ends[B].endpoint.wait(Duration::from_micros(100)).unwrap();
        }
        self.seen.clear();
    }
}

#[test]
fn the_steady_state_allocates_nothing() {
    if !has_devices() {
        return;
    }
    let mut fixture = Verbs { spin: Duration::ZERO };
    let mut rounds = Rounds::new(&mut fixture);
    (0..10).for_each(|number| rounds.round(number));
    let before = ALLOCATIONS.get();
    (0..1000).for_each(|number| rounds.round(number));
    assert_eq!(ALLOCATIONS.get() - before, 0);
}

const TRACED: &str = "STEPMESH_STEADY_TRACED";
const TRACED_ROUNDS: usize = 500;
/// Looked for in vain, before and after what is traced: a call that nobody else makes.
const MARK: &str = "/stepmesh/steady";

/// Not a test of its own: the process that `strace` watches.
#[test]
fn traced_rounds() {
    if std::env::var_os(TRACED).is_none() {
        return;
    }
    // Longer than any wait lasts: it never sleeps.
    let mut fixture = Verbs { spin: Duration::from_secs(1) };
    let mut rounds = Rounds::new(&mut fixture);
    (0..10).for_each(|number| rounds.round(number));
    let _ = std::fs::metadata(MARK);
    (0..TRACED_ROUNDS as u32).for_each(|number| rounds.round(number));
    let _ = std::fs::metadata(MARK);
}

#[test]
fn the_spinning_steady_state_makes_one_system_call_a_chain() {
    if !has_devices() {
        return;
    }
    let trace = std::env::temp_dir().join(format!("stepmesh-trace-{}", std::process::id()));
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", "signal=none", "-o"]).arg(&trace);
    strace.arg(std::env::current_exe().unwrap()).args(["traced_rounds", "--exact", "--test-threads=1"]);
    let output = match strace.env(TRACED, "1").output() {
        Ok(output) => output,
        Err(why) => {
            assert!(std::env::var_os("STEPMESH_REQUIRE_RDMA").is_none(), "strace: {why}");
            return println!("skipped: strace: {why}");
        }
    };
    assert!(output.status.success(), "{output:?}");
    let lines = std::fs::read_to_string(&trace).unwrap();
    std::fs::remove_file(&trace).unwrap();
    let calls = calls_between_marks(&lines);
    println!("{TRACED_ROUNDS} rounds of {CHAINS} chains: {calls:?}");
    assert_eq!(calls.values().copied().collect::<Vec<_>>(), [TRACED_ROUNDS * CHAINS], "{calls:?}");
    assert!(calls.keys().all(|call| ["write", "ioctl"].contains(&call.as_str())), "{calls:?}");
}

/// The calls of the thread that makes the marks, by name. A line is a process, a name and arguments; a call during which
/// others ran ends in a line of its own.
fn calls_between_marks(lines: &str) -> BTreeMap<String, usize> {
    let mut marks = lines.lines().filter(|line| line.contains(MARK));
    let thread = marks.next().and_then(|line| line.split_whitespace().next()).expect("the first mark");
    assert_eq!(marks.count(), 1, "the second mark");
    let own = lines.lines().filter_map(|line| line.strip_prefix(thread)?.strip_prefix(' ')).map(str::trim_start);
    let between = own.skip_while(|call| !call.contains(MARK)).skip(1).take_while(|call| !call.contains(MARK));
    let mut calls = BTreeMap::new();
    for call in between.filter(|call| !call.starts_with("<...")) {
        *calls.entry(call.split('(').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    calls
}
