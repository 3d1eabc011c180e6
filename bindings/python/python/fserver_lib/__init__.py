"""StepMesh's Python module, on stepmesh: same names, arguments, defaults and environment.

What is different: where StepMesh aborts or spins for ever there is an exception (:mod:`stepmesh.errors`), more than 31
workers work, tensors may have no rows, ``fetch_trace`` is always on, and no NIC is needed. Tensors are PyTorch's, or
NumPy's. ``docs/integration.md`` goes through it call by call.
"""

from __future__ import annotations

import os
from typing import Any, Iterable

import stepmesh
from stepmesh import _native, _streams
from stepmesh.errors import Closed, Forked, InvalidArgument, WrongRole

from ._environment import Environment
from ._notify import SimpleNotify, map_pinned_tensor, seq_add_one, wait_flag, write_flag
from ._tensors import makers


class Trace(list):
    """Eight stamps in nanoseconds: request start, post-send, receive, process, response start, post-send, receive,
    process. 2 to 5 are on the server's clock. ``copied_bytes`` is what was copied between slots and tensors on both sides:
    what tensors in slots (``push_buffers``, ``reply_buffers``, ``STEPMESH_IN_PLACE``) would save."""

    copied_bytes: int = 0


class _Nobody:
    """In the place of a worker or server that this process is not: whatever is asked of it is refused."""

    def __init__(self, error: type[Exception], words: str) -> None:
        self._error, self._words = error, words

    def __getattr__(self, name: str) -> Any:
        raise self._error(self._words)

    def __bool__(self) -> bool:
        return False


_BEFORE = _Nobody(Closed, "init() has not been called")
_AFTER = _Nobody(Closed, "stop() has been called: init() again first")
_NO_WORKER = _Nobody(WrongRole, "this process is no worker: only a worker (attention) makes requests")
_NO_SERVER = _Nobody(WrongRole, "this process is no server: only a server (FFN) answers requests")


class _Process:
    """This process's part in the mesh, between ``init`` and ``stop``."""

    def __init__(self) -> None:
        self.environment: Environment | None = None
        self.schedulers: list[stepmesh.Scheduler] = []
        self.worker: Any = _BEFORE
        self.server: Any = _BEFORE
        #: With groups of several processes, a mesh of all of them, for barriers.
        self.everybody: Any = None
        self.pid = 0
        self.stopped = False

    def check(self) -> Environment:
        if self.environment is None:
            raise Closed("stop() has been called: init() again first" if self.stopped else "init() has not been called")
        if self.pid != os.getpid():
            raise Forked("init() was called before this process was forked off: fork first, then init(), or use spawn")
        return self.environment

    def meet(self, name: str, group: str, timeout: float) -> None:
        """A barrier of all groups: first on the mesh that requests travel on, so that those under way are answered."""
        (self.worker or self.server).barrier(name, group, timeout)
        if self.everybody:
            self.everybody.barrier(name, group, timeout)


_process = _Process()


def init() -> None:
    """Joins as the environment says, and returns when every worker and server has come. The scheduler returns at once."""
    if _process.environment is not None:
        _process.check()
        raise InvalidArgument("init() has been called already")
    environment = Environment.read()
    if environment.verbosity > 0:
        stepmesh.log_to_stderr(["info", "debug", "trace"][min(environment.verbosity, 3) - 1])
    worker, server = _NO_WORKER, _NO_SERVER
    if environment.role == "scheduler":
        _start_schedulers(environment)
    else:
        options = environment.options()
        if environment.role == "worker":
            member = _native.Worker(options, environment.slots, environment.slot_bytes, environment.slot_timeout)
        else:
            new, part, wrap = makers(environment.tensors, environment.gpu)
            member = _native.Server(
                options, environment.slots, environment.slot_bytes, new, part, wrap, environment.in_place
            )
        try:
            member.wait_complete(environment.init_timeout)
            if environment.group_size > 1:
                kind = stepmesh.AttentionMesh if environment.role == "worker" else stepmesh.FfnMesh
                _process.everybody = kind(environment.everybody())
                _process.everybody.wait_complete(environment.init_timeout)
            (_process.everybody or member).barrier("init", "all", environment.init_timeout)
        except BaseException:
            for open_ in (member, _process.everybody):
                if open_ is not None:
                    open_.close()
            _process.everybody = None
            raise
        if environment.role == "worker":
            worker = member
        else:
            server = member
    _process.worker, _process.server = worker, server
    _process.environment, _process.pid, _process.stopped = environment, os.getpid(), False


def _start_schedulers(environment: Environment) -> None:
    """One for each index of the groups, and for larger groups one of all processes, at successive ports."""
    if not environment.host.startswith("127.") and environment.token is None and not environment.insecure:
        raise InvalidArgument(
            f"DMLC_PS_ROOT_URI: {environment.host} can be reached from other hosts: set STEPMESH_TOKEN to one secret in "
            "all processes, or STEPMESH_INSECURE=1 if the network is trusted"
        )
    try:
        for index in range(environment.schedulers):
            members = environment.group_size if index == environment.group_size else 1
            _process.schedulers.append(
                stepmesh.Scheduler(
                    environment.workers * members,
                    environment.servers * members,
                    listen=f"{environment.host}:{environment.port + index}",
                    token=environment.token,
                    insecure=environment.insecure,
                )
            )
    except BaseException:
        while _process.schedulers:
            _process.schedulers.pop().close()
        raise


def stop() -> None:
    """Waits until every worker and server stops, then leaves. The scheduler waits until all have left."""
    environment = _process.check()
    worker, server, schedulers = _process.worker, _process.server, _process.schedulers
    try:
        for scheduler in schedulers:
            scheduler.wait_left()
        if worker:
            worker.say_stop(environment.stop_timeout)
        if worker or server:
            _process.meet("stop", "all", environment.stop_timeout)
    finally:
        for open_ in (worker, server, _process.everybody, *schedulers):
            if open_:
                open_.close()
        _process.environment = _process.everybody = None
        _process.worker = _process.server = _AFTER
        _process.schedulers = []
        _process.stopped = True


def barrier(include_server: bool, include_client: bool, instance_barrier: bool = True) -> None:
    """Waits until every process of the groups named has come, as often as this one: servers, clients (workers), or both.
    Without ``instance_barrier`` only the processes of this one's index meet, which form a mesh of their own."""
    environment = _process.check()
    group = {(True, True): "all", (True, False): "ffn", (False, True): "attention"}.get(
        (bool(include_server), bool(include_client))
    )
    if group is None:
        raise InvalidArgument("include_server, include_client: a barrier of nobody")
    if {"worker": "ffn", "server": "attention"}.get(environment.role, "all") == group or environment.role == "scheduler":
        raise WrongRole(f"this is a {environment.role}, and the barrier is for others")
    if instance_barrier:
        _process.meet("barrier", group, environment.stop_timeout)
    else:
        (_process.worker or _process.server).barrier("index", group, environment.stop_timeout)


def push_pull(
    push_tensors: Iterable[Any],
    push_keys: Iterable[int],
    pull_tensors: Iterable[Any],
    pull_keys: Iterable[int],
    need_event: bool = True,
) -> int:
    """Sends every push tensor to every server, and has the pull tensors, server-major, filled with their answers. Returns a
    handler for ``wait``. The push tensors may be changed at once; the pull tensors belong to the request until its end.

    Tensors on a GPU (``STEPMESH_BAKCEND=GPU``) are copied behind what is on the current stream, and sent by the call that finds
    them copied; without ``need_event`` they are there already. What changes them is to be put on that stream, too."""
    return _process.worker.push_pull(push_tensors, push_keys, pull_tensors, pull_keys, _stream() if need_event else None)


def _stream() -> int | None:
    environment = _process.environment
    if environment is None or environment.gpu is None:
        return None
    if _streams.is_capturing(environment.gpu):
        raise InvalidArgument("a captured CUDA graph cannot hold a request of fserver_lib: run this part eagerly")
    return _streams.current(environment.gpu)


def wait(handler: int, timeout_ms: int = 10_000) -> None:
    """Waits until the pull tensors of a request are filled. ``Timeout`` leaves it under way."""
    _process.worker.wait(handler, timeout_ms / 1e3)


def get_all_handlers(handler: int) -> list[int]:
    """The request's own handler, then one for each push and each pull."""
    return _process.worker.handlers(handler)


def fetch_trace(handler: int) -> Trace:
    """Where a request's time went, at the server of a pull's handler, or at the one that was last to answer."""
    stamps, copied_bytes = _process.worker.trace(handler)
    trace = Trace(stamps)
    trace.copied_bytes = copied_bytes
    return trace


def push_buffers(specs: Iterable[tuple[tuple[int, ...], Any]]) -> list[Any]:
    """Tensors of these shapes and element types in registered memory: filled and given to the next ``push_pull`` that is to
    send them, all and in this order, they are not copied. stepmesh's own."""
    environment = _process.check()
    wrap = makers(environment.tensors)[2]
    return [wrap(tensor) for tensor in _process.worker.push_buffers([(list(shape), dtype) for shape, dtype in specs])]


def register_recv_buffer(tensor: Any, worker_ranks: Iterable[int], push_keys: Iterable[int]) -> None:
    """The i-th of ``len(worker_ranks)`` equal parts of ``tensor`` receives what ``worker_ranks[i]`` pushes under
    ``push_keys[i]``."""
    _process.server.register_recv_buffer(tensor, list(worker_ranks), push_keys)


def get_batch(timeout_ms: float | None = None) -> list[tuple[int, list[Any], list[int]]]:
    """Waits until every worker has a request waiting; one entry for each, by rank: (handler, tensors, keys). A tensor
    is its key's until the next request under that key. Raises ``PeerLost`` once for a worker that is lost, and goes on with
    the others. Empty when all workers have stopped, or after ``timeout_ms``."""
    batch = _process.server.get_batch(None if timeout_ms is None else timeout_ms / 1e3)
    return [] if batch is None else batch


def respond(tensors: Iterable[Any], handler: int, need_event: bool = False) -> None:
    """Answers a request: one tensor for each of its pulls. As for :func:`push_pull`, those on a GPU are copied behind what is on
    the current stream with ``need_event``, and sent by the call that finds them copied: ``get_batch``, as a rule."""
    _process.server.respond(tensors, handler, _stream() if need_event else None)


def respond_vec(ret_buffer: Any, tensors_vec: Iterable[Any], handler_vec: Iterable[int]) -> None:
    """Answers each request i with the first ``tensors_vec[i].size(0)`` rows of ``ret_buffer``."""
    _process.server.respond_vec(ret_buffer, tensors_vec, list(handler_vec), _stream())


def reply_buffers(handler: int) -> list[Any]:
    """Tensors for a request's pulls in registered memory: filled and given to ``respond`` they are not copied. stepmesh's
    own."""
    environment = _process.check()
    wrap = makers(environment.tensors)[2]
    return [wrap(tensor) for tensor in _process.server.reply_buffers(handler)]


def get_nanosecond() -> int:
    """The monotonic clock, in nanoseconds."""
    return _native.nanosecond()


__all__ = [
    "SimpleNotify",
    "Trace",
    "barrier",
    "fetch_trace",
    "get_all_handlers",
    "get_batch",
    "get_nanosecond",
    "init",
    "map_pinned_tensor",
    "push_buffers",
    "push_pull",
    "register_recv_buffer",
    "reply_buffers",
    "respond",
    "respond_vec",
    "seq_add_one",
    "stop",
    "wait",
    "wait_flag",
    "write_flag",
]
