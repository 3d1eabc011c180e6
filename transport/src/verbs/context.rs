//! An opened rail: a device's port and address, its limits, and the protection domain of all its registrations and
//! queue pairs.

use super::gid;
use super::library::{check, check_pointer, no_devices, no_list, verbs};
use super::options::VerbsOptions;
use super::rails::Wanted;
use super::sys::*;
use crate::TransportError;
use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const LINK_LAYER_ETHERNET: u8 = 2;
/// Reads that a queue pair has under way at most.
const READS: i32 = 16;

/// What the device and its port allow, cut down to what is used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) queue_depth: usize,
    pub(super) completions: usize,
    /// Bytes of one work request.
    pub(super) message_bytes: usize,
    /// Reads that this side may have under way, and that it answers at a time.
    pub(super) reads: u8,
    /// Whether it does atomic operations, for peers and for this side.
    pub(super) atomics: bool,
}

/// Where the port is found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Port {
    pub(super) number: u8,
    pub(super) mtu: ibv_mtu,
    pub(super) lid: u16,
    pub(super) gid: [u8; 16],
    pub(super) gid_index: u8,
    /// RoCE has no local identifiers: its packets carry a global route.
    pub(super) is_ethernet: bool,
}

/// See the module. Closed when the last region and queue pair are gone.
pub(super) struct Context {
    pub(super) verbs: &'static Verbs,
    pub(super) raw: *mut ibv_context,
    pub(super) domain: *mut ibv_pd,
    pub(super) name: String,
    pub(super) options: VerbsOptions,
    pub(super) limits: Limits,
    pub(super) port: Port,
    /// How often the port or the device was lost.
    losses: AtomicU64,
    events: Mutex<()>,
}

// SAFETY: libibverbs' objects may be used from any thread; its calls lock what they share.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A device list that is freed.
struct DeviceList {
    verbs: &'static Verbs,
    list: *mut *mut ibv_device,
    len: usize,
}

impl DeviceList {
    fn get() -> Result<Self, TransportError> {
        let verbs = verbs()?;
        let mut len = 0;
        // SAFETY: `len` is a place for the count.
        let list = unsafe { verbs.ibv_get_device_list(&mut len) };
        if list.is_null() {
            return Err(no_list(std::io::Error::last_os_error()));
        }
        let list = Self { verbs, list, len: usize::try_from(len).unwrap_or(0) };
        if list.len == 0 { Err(no_devices("the kernel knows of none")) } else { Ok(list) }
    }

    fn devices(&self) -> &[*mut ibv_device] {
        // SAFETY: the library returned an array of `len` pointers, valid until it is freed.
        unsafe { std::slice::from_raw_parts(self.list, self.len) }
    }

    fn name(&self, device: *mut ibv_device) -> String {
        // SAFETY: a device of the list has a name, a C string that lives as long as the list.
        unsafe { CStr::from_ptr(self.verbs.ibv_get_device_name(device)) }.to_string_lossy().into_owned()
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list came from the library and is freed once; opened devices outlive it.
        unsafe { self.verbs.ibv_free_device_list(self.list) };
    }
}

pub(super) fn device_names() -> Result<Vec<String>, TransportError> {
    let list = DeviceList::get()?;
    Ok(list.devices().iter().map(|&device| list.name(device)).collect())
}

impl Context {
    /// Opens the port that is asked for, or the first that works.
    pub(super) fn open(options: &VerbsOptions, wanted: Option<Wanted<'_>>) -> Result<Arc<Self>, TransportError> {
        let list = DeviceList::get()?;
        let port = wanted.and_then(|wanted| wanted.port);
        let mut refused = None;
        for &device in list.devices() {
            let name = list.name(device);
            if wanted.is_none_or(|wanted| wanted.device == name) {
                match Self::open_device(list.verbs, device, name, port, options) {
                    Ok(context) => return Ok(Arc::new(context)),
                    Err(why) => refused = refused.or(Some(why)),
                }
            }
        }
        let names = || device_names().unwrap_or_default().join(", ");
        Err(refused.unwrap_or_else(|| {
            let wanted = wanted.map_or("", |wanted| wanted.device);
            TransportError::invalid(format!("there is no RDMA device `{wanted}`, but {}", names()))
        }))
    }

    fn open_device(
        verbs: &'static Verbs,
        device: *mut ibv_device,
        name: String,
        port: Option<u8>,
        options: &VerbsOptions,
    ) -> Result<Self, TransportError> {
        // SAFETY: the device is of a list that is still held.
        let raw = check_pointer(unsafe { verbs.ibv_open_device(device) }, || format!("opening {name}"))?;
        let nowhere = Port { number: 0, mtu: 0, lid: 0, gid: [0; 16], gid_index: 0, is_ethernet: false };
        let mut context = Self {
            verbs,
            raw,
            domain: ptr::null_mut(),
            name,
            options: options.clone(),
            limits: Limits { queue_depth: 0, completions: 0, message_bytes: 0, reads: 0, atomics: false },
            port: nowhere,
            losses: AtomicU64::new(0),
            events: Mutex::new(()),
        };
        let mut attributes = ibv_device_attr::default();
        // SAFETY: the context is open and `attributes` a place for the answer.
        check(unsafe { verbs.ibv_query_device(raw, &mut attributes) }, || format!("querying {}", context.name))?;
        let (port, message_bytes) = context.find_port(port, attributes.phys_port_cnt)?;
        context.port = port;
        context.limits = Limits {
            // One more is kept for the marker that ends a lane.
            queue_depth: options.queue_depth.min(usize::try_from(attributes.max_qp_wr - 1).unwrap_or(0)),
            completions: usize::try_from(attributes.max_cqe).unwrap_or(0),
            // Half of what the port says: some drivers take less than it by a little.
            message_bytes: (message_bytes as usize / 2).clamp(1, 1 << 30),
            reads: attributes.max_qp_rd_atom.min(attributes.max_qp_init_rd_atom).clamp(0, READS) as u8,
            atomics: attributes.atomic_cap != IBV_ATOMIC_NONE,
        };
        // SAFETY: the context is open.
        let domain = unsafe { verbs.ibv_alloc_pd(raw) };
        context.domain = check_pointer(domain, || format!("making a protection domain on {}", context.name))?;
        rustix::io::ioctl_fionbio(context.event_fd(), true)
            .map_err(|errno| TransportError::system("watching the device's events", errno))?;
        Ok(context)
    }

    /// The port that is asked for, or the first that is active; and the bytes of its longest message.
    fn find_port(&self, wanted: Option<u8>, ports: u8) -> Result<(Port, u32), TransportError> {
        let name = &self.name;
        let candidates = wanted.map_or(1..=ports, |port| port..=port);
        for number in candidates.clone() {
            let attributes = self.query_port(number)?;
            if attributes.state != IBV_PORT_ACTIVE {
                continue;
            }
            let is_ethernet = attributes.link_layer == LINK_LAYER_ETHERNET;
            let entry = self.find_gid(number, attributes.gid_tbl_len, is_ethernet)?;
            let port = Port {
                number,
                mtu: self.options.path_mtu()?.map_or(attributes.active_mtu, |wanted| wanted.min(attributes.active_mtu)),
                lid: attributes.lid,
                gid: gid::bytes(&entry),
                gid_index: entry.gid_index as u8,
                is_ethernet,
            };
            return Ok((port, attributes.max_msg_sz));
        }
        Err(TransportError::Unsupported {
            what: format!("RDMA on {name}"),
            hint: format!("no port of {candidates:?} is active; see `rdma link` and plug it in or set it up"),
        })
    }

    fn query_port(&self, number: u8) -> Result<ibv_port_attr, TransportError> {
        let mut attributes = ibv_port_attr::default();
        // SAFETY: the context is open; the call fills the part of the structure that is common to all versions.
        let code = unsafe { self.verbs.ibv_query_port(self.raw, number, (&raw mut attributes).cast()) };
        check(code, || format!("querying port {number} of {}", self.name)).map(|()| attributes)
    }

    /// Whether the port carries anything now.
    pub(super) fn is_port_active(&self) -> bool {
        self.query_port(self.port.number).is_ok_and(|port| port.state == IBV_PORT_ACTIVE)
    }

    fn find_gid(&self, port: u8, len: i32, is_ethernet: bool) -> Result<ibv_gid_entry, TransportError> {
        let query = |index: u32| {
            let mut entry = ibv_gid_entry::default();
            let (number, size) = (u32::from(port), size_of::<ibv_gid_entry>());
            // SAFETY: the context is open, and `entry` is a place of the size that is told.
            let code = unsafe { self.verbs._ibv_query_gid_ex(self.raw, number, index, &mut entry, 0, size) };
            check(code, || format!("querying GID {index} of port {port} of {}", self.name)).map(|()| entry)
        };
        match self.options.gid_index {
            Some(index) => query(index.into()),
            None if !is_ethernet => query(0),
            None => {
                let entries: Vec<_> = (0..len.clamp(0, 256) as u32).filter_map(|index| query(index).ok()).collect();
                gid::choose(&entries).copied().ok_or_else(|| TransportError::Unsupported {
                    what: format!("RoCE on {}", self.name),
                    hint: format!("port {port} has no address; give its network interface one"),
                })
            }
        }
    }

    /// What becomes readable when the device has something to tell.
    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the context is.
        unsafe { BorrowedFd::borrow_raw((*self.raw).async_fd) }
    }

    /// How often the port or the device was lost, of what was taken in so far.
    pub(super) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Relaxed)
    }

    /// Takes in what the device has to tell.
    pub(super) fn take_events(&self) {
        if let Ok(_alone) = self.events.try_lock() {
            let mut event = ibv_async_event::default();
            // SAFETY: the context is open, and `event` a place for an event; the descriptor does not block.
            while unsafe { self.verbs.ibv_get_async_event(self.raw, &mut event) } == 0 {
                let lost = match event.event_type {
                    IBV_EVENT_PORT_ERR => {
                        // SAFETY: an event of a port carries the port's number.
                        let port = unsafe { event.element.port_num };
                        port == self.port.number.into()
                    }
                    IBV_EVENT_DEVICE_FATAL => true,
                    _ => false,
                };
                if lost {
                    self.losses.fetch_add(1, Ordering::Relaxed);
                }
                // SAFETY: the event was just taken; each is acknowledged once.
                unsafe { self.verbs.ibv_ack_async_event(&mut event) };
            }
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: everything made on the device holds the context, so nothing is left; each is released once.
        unsafe {
            if !self.domain.is_null() {
                self.verbs.ibv_dealloc_pd(self.domain);
            }
            self.verbs.ibv_close_device(self.raw);
        }
    }
}
