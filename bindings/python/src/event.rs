//! Events and traces as plain dicts.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use stepmesh_mesh::{MeshEvent, Peer, Trace};
use stepmesh_proto::control::to_member;

/// An event; `kind` says which other keys there are.
pub(crate) fn to_dict<'py>(py: Python<'py>, event: &MeshEvent) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let peer = |peer: &Peer| -> PyResult<()> {
        dict.set_item("role", peer.role.to_string())?;
        dict.set_item("rank", peer.rank)?;
        dict.set_item("name", &peer.name)?;
        dict.set_item("pid", peer.pid)
    };
    let kind = match event {
        MeshEvent::Joined { rank, epoch } => {
            dict.set_item("rank", rank)?;
            dict.set_item("epoch", epoch)?;
            "joined"
        }
        MeshEvent::LinkUp(of) => {
            peer(of)?;
            "link_up"
        }
        MeshEvent::LinkDown { peer: of, reason } => {
            peer(of)?;
            dict.set_item("reason", reason)?;
            "link_down"
        }
        MeshEvent::PeerLost { peer: of, reason } => {
            peer(of)?;
            dict.set_item("reason", reason)?;
            "peer_lost"
        }
        MeshEvent::Epoch { epoch, complete } => {
            dict.set_item("epoch", epoch)?;
            dict.set_item("complete", complete)?;
            "epoch"
        }
        MeshEvent::SchedulerLost(reason) => {
            dict.set_item("reason", reason)?;
            "scheduler_lost"
        }
        MeshEvent::Control(to_member::Body::Drain(_)) => "draining",
        _ => "other",
    };
    dict.set_item("kind", kind)?;
    Ok(dict)
}

/// Where a transfer's time went, in nanoseconds.
pub(crate) fn trace<'py>(py: Python<'py>, trace: &Trace) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (key, ns) in [
        ("a2f_ns", trace.a2f_ns),
        ("queue_ns", trace.queue_ns),
        ("process_ns", trace.process_ns),
        ("f2a_ns", trace.f2a_ns),
        ("round_trip_ns", trace.round_trip_ns),
    ] {
        dict.set_item(key, ns)?;
    }
    dict.set_item("same_clock", trace.same_clock)?;
    Ok(dict)
}
