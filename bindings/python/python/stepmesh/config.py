"""How members join: plain, typed objects. All members of a deployment agree on layout, transport, lanes and workload."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Sequence


@dataclass(frozen=True)
class PartSpec:
    """Room for one part of a transfer: at most ``row_bytes * max_rows`` bytes."""

    row_bytes: int
    max_rows: int


@dataclass(frozen=True)
class Layout:
    """The slots: ``microbatches`` of them for each peer and direction, each with these parts (8 at most)."""

    request: Sequence[PartSpec]
    reply: Sequence[PartSpec]
    microbatches: int = 3


@dataclass(frozen=True)
class Options:
    """How a member joins."""

    #: The scheduler's address, ``http://host:port``.
    scheduler: str
    layout: Layout
    #: ``shm`` (one host), ``tcp`` (any two), ``verbs`` (RDMA; libibverbs is loaded when it is asked for).
    transport: Literal["shm", "tcp", "verbs"] = "shm"
    #: The cluster's secret, if the scheduler asks for one.
    token: str | None = field(default=None, repr=False)
    #: For people: what the others call this member.
    name: str = ""
    #: What is computed, for comparison between members.
    workload: str = ""
    #: The rank to ask for; the lowest free one otherwise.
    rank: int | None = None
    #: Lanes of each link, 1 to 8.
    lanes: int = 1
    #: tcp: the IP address that peers dial; 127.0.0.1 otherwise.
    address: str | None = None
    #: verbs: the rails, such as ``mlx5_0`` or ``mlx5_1:2``; the first active port otherwise.
    devices: Sequence[str] = ()
    gid_index: int | None = None
    traffic_class: int = 0
    service_level: int = 0
    #: The GPU that slots are to be on, as CUDA counts those that are visible: tensors are then CUDA's (shm, verbs), or the
    #: CPU's in page-locked memory (tcp). None: host memory.
    gpu: int | None = None
    #: How long a wait polls before it sleeps. Zero is right where there are fewer cores than pollers.
    spin_us: int = 0
    #: Who makes progress: the calls (``caller``), or a thread of the mesh's own (``thread``), pinned to ``cpu``.
    progress: Literal["caller", "thread"] = "caller"
    cpu: int | None = None
    #: Most bytes of registered memory that the slots may take.
    memory_limit_bytes: int = 4 << 30
    #: Seconds to look for the scheduler, and then to wait to be admitted.
    join_timeout: float = 30.0
