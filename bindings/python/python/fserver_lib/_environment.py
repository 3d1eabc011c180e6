"""StepMesh's environment variables, misspellings included, and those that are stepmesh's own."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

from stepmesh import Layout, Options, PartSpec
from stepmesh.errors import InvalidArgument

_ROLES = ("scheduler", "worker", "server")


def _text(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    return value or None


def _required(name: str, meaning: str) -> str:
    value = _text(name)
    if value is None:
        raise InvalidArgument(f"{name} is not set: {meaning}")
    return value


def _number(name: str, default: int | None = None, meaning: str = "", least: int = 0) -> int:
    value = _text(name) if default is not None else _required(name, meaning)
    if value is None:
        return default  # type: ignore[return-value]
    try:
        number = int(value)
    except ValueError:
        raise InvalidArgument(f"{name}: {value!r} is no number") from None
    if number < least:
        raise InvalidArgument(f"{name}: {number} is below {least}")
    return number


def _seconds(name: str, default: float) -> float:
    value = _text(name)
    try:
        return default if value is None else float(value)
    except ValueError:
        raise InvalidArgument(f"{name}: {value!r} is no number of seconds") from None


def _is_set(name: str) -> bool:
    return (_text(name) or "0").lower() not in ("0", "false", "off", "no")


def _resolve(host: str) -> str:
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise InvalidArgument(f"DMLC_PS_ROOT_URI: {host!r} cannot be resolved: {error}") from None


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24])  # SIOCGIFADDR
        except OSError as error:
            raise InvalidArgument(f"DMLC_INTERFACE: {interface!r} has no address: {error}") from None


def _address_towards(host: str) -> str:
    """The address of this host from which the other one is reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


@dataclass(frozen=True)
class Environment:
    """What the environment says of this process."""

    role: str
    host: str
    port: int
    workers: int
    servers: int
    group_size: int
    #: Which of the group's processes this is; those of one index form a mesh of their own.
    index: int
    #: The rank within that mesh.
    rank: int
    transport: str
    token: str | None
    insecure: bool
    slots: int
    slot_bytes: int
    in_place: bool
    tensors: str | None
    #: The GPU that tensors may be on.
    gpu: int | None
    init_timeout: float
    stop_timeout: float
    slot_timeout: float
    verbosity: int

    @staticmethod
    def read() -> "Environment":
        role = _required("DMLC_ROLE", "scheduler, worker (attention) or server (FFN)").lower()
        if role not in _ROLES:
            raise InvalidArgument(f"DMLC_ROLE: {role!r}: scheduler, worker or server")
        host = _resolve(_required("DMLC_PS_ROOT_URI", "the scheduler's host"))
        port = _number("DMLC_PS_ROOT_PORT", meaning="the scheduler's port", least=1)
        workers = _number("DMLC_NUM_WORKER", meaning="the number of worker groups", least=1)
        servers = _number("DMLC_NUM_SERVER", meaning="the number of server groups", least=1)
        group_size = _number("DMLC_GROUP_SIZE", 1, least=1)
        position = group_size * _number("DMLC_NODE_RANK", 0) + _number("STEPMESH_GPU", 0)
        position += _number("DMLC_RANK_OFFSET", 0, least=-(1 << 31))
        groups = workers if role == "worker" else servers
        if role != "scheduler" and not 0 <= position < groups * group_size:
            raise InvalidArgument(
                f"DMLC_NODE_RANK, STEPMESH_GPU and DMLC_RANK_OFFSET make rank {position}, and there are "
                f"{groups} groups of {group_size} {role}s"
            )
        backend = (_text("STEPMESH_BAKCEND") or _text("STEPMESH_BACKEND") or "CPU").upper()
        if backend not in ("CPU", "GPU"):
            raise InvalidArgument(f"STEPMESH_BAKCEND: {backend!r}: CPU or GPU")
        gpu = _number("STEPMESH_GPU", 0) if backend == "GPU" and role != "scheduler" else None
        in_place = _is_set("STEPMESH_IN_PLACE")
        if gpu is not None and in_place:
            raise InvalidArgument("STEPMESH_IN_PLACE: with STEPMESH_BAKCEND=GPU tensors are copied to the GPU")
        return Environment(
            role=role,
            host=host,
            port=port,
            workers=workers,
            servers=servers,
            group_size=group_size,
            index=position % group_size,
            rank=position // group_size,
            transport=_transport(host),
            token=_text("STEPMESH_TOKEN"),
            insecure=_is_set("STEPMESH_INSECURE"),
            slots=_number("STEPMESH_SLOTS", 4, least=1),
            slot_bytes=_number("STEPMESH_SLOT_BYTES", 16 << 20, least=1),
            in_place=in_place,
            tensors=_text("STEPMESH_TENSORS"),
            gpu=gpu,
            init_timeout=_seconds("STEPMESH_INIT_TIMEOUT", 300.0),
            stop_timeout=_seconds("STEPMESH_STOP_TIMEOUT", 600.0),
            slot_timeout=_seconds("STEPMESH_SLOT_TIMEOUT", 60.0),
            verbosity=_number("PS_VERBOSE", 0),
        )

    def options(self) -> Options:
        """How this process joins."""
        threaded = _text("STEPMESH_PROGRESS") or ("thread" if self.transport == "tcp" else "caller")
        rails = _text("STEPMESH_DEVICES") or ""
        return Options(
            scheduler=f"http://{self.host}:{self.port + self.index}",
            layout=None,  # type: ignore[arg-type]  # fserver_lib lays its slots out itself.
            transport=self.transport,  # type: ignore[arg-type]
            token=self.token,
            name=f"{socket.gethostname()} {self.role}",
            workload="fserver_lib 1",
            rank=self.rank,
            lanes=_number("STEPMESH_LANES", 2 if _is_set("STEPMESH_SPLIT_QP_LAG") else 1, least=1),
            address=self._address(),
            devices=[rail.strip() for rail in rails.split(",") if rail.strip()],
            gpu=self.gpu,
            spin_us=_number("STEPMESH_SPIN_US", 0),
            progress=threaded,  # type: ignore[arg-type]
            cpu=_cpu() if threaded == "thread" else None,
            memory_limit_bytes=_number("STEPMESH_MEMORY_LIMIT", 1 << 40, least=1),
            join_timeout=self.init_timeout,
        )

    @property
    def schedulers(self) -> int:
        """One for each index, and one for all where there are several."""
        return self.group_size + (self.group_size > 1)

    def everybody(self) -> Options:
        """How this process joins the mesh of all processes, in which nothing but barriers happens."""
        transport = "shm" if self.transport == "shm" else "tcp"
        return Options(
            scheduler=f"http://{self.host}:{self.port + self.group_size}",
            layout=Layout([PartSpec(1, 1)], [PartSpec(1, 1)], 1),
            transport=transport,  # type: ignore[arg-type]
            token=self.token,
            name=f"{socket.gethostname()} {self.role}",
            workload="fserver_lib barriers 1",
            rank=self.rank * self.group_size + self.index,
            address=None if transport == "shm" else self._own_address(),
            join_timeout=self.init_timeout,
        )

    def _address(self) -> str | None:
        return self._own_address() if self.transport == "tcp" else None

    def _own_address(self) -> str:
        host, interface = _text("DMLC_NODE_HOST"), _text("DMLC_INTERFACE")
        if host is not None:
            return _resolve(host)
        if interface is not None and interface != "auto":
            return _address_of(interface)
        return _address_towards(self.host)


def _transport(host: str) -> str:
    named, rdma = _text("STEPMESH_TRANSPORT"), (_text("DMLC_ENABLE_RDMA") or "0").lower()
    if named is not None:
        if named not in ("shm", "tcp", "verbs"):
            raise InvalidArgument(f"STEPMESH_TRANSPORT: {named!r}: shm, tcp or verbs")
        return named
    if rdma in ("ibverbs", "1", "true"):
        return "verbs"
    # Only then are all on one host for certain.
    return "shm" if host.startswith("127.") else "tcp"


def _cpu() -> int | None:
    """The core for the progress thread, as StepMesh reckons it; None leaves it to the system."""
    if not _is_set("STEPMESH_BIND_CPU_CORE"):
        return None
    per_gpu = _number("STEPMESH_CPU_CORES_PER_GPU", 5, least=1)
    per_socket = _number("STEPMESH_CPU_CORES_PER_SOCKET", 48, least=1)
    gpus = max(per_socket // per_gpu, 1)
    gpu = _number("STEPMESH_GPU", 0)
    core = gpu // gpus * per_socket + gpu % gpus * per_gpu + _number("STEPMESH_CPU_START_OFFSET", 0)
    allowed = sorted(os.sched_getaffinity(0))
    return core if core in allowed else allowed[core % len(allowed)]
