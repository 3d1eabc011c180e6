"""Signals between a stream and the host.

With ``STEPMESH_BAKCEND=GPU`` they are stream memory operations on PyTorch's current stream: no kernel waits or writes. On the
CPU the calling thread is the stream: what it waits for, it waits for.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any, Callable

import stepmesh
from stepmesh import _native, _streams
from stepmesh.errors import DeviceUnsupported, InvalidArgument, InvalidType

#: Holds of a stream that may be under way at once.
_GATES = 64


def _gpu() -> int | None:
    """The GPU that this process is at."""
    from . import _process

    return _process.environment.gpu if _process.environment is not None else None


class SimpleNotify:
    """Orders a stream after a request, or after the next batch. On a GPU the calls return at once: the stream is held by a
    gate, which a thread opens when what it waits for has come."""

    def __init__(self) -> None:
        self._ready = False
        self._gpu: int | None = None
        self._gates: Any = None
        #: Those that the stream has not passed yet, as far as is known, and the one that comes next.
        self._held: set[int] = set()
        self._next = 0
        #: What the holds wait for, the oldest first.
        self._waits: list[Future[Any]] = []
        self._batch: Future[Any] | None = None

    def init(self) -> None:
        """Makes it ready."""
        self._gpu = _gpu()
        if self._gpu is not None and self._gates is None:
            self._gates = stepmesh.Gates(_GATES, self._gpu)
        self._ready = True

    def _check(self) -> None:
        if not self._ready:
            raise InvalidArgument("SimpleNotify: init() has not been called")

    def _hold_until(self, happen: Callable[[], Any]) -> Future[Any]:
        """Holds the stream until ``happen`` has returned; on the CPU the stream is this thread."""
        future: Future[Any] = Future()
        if self._gpu is None:
            future.set_result(happen())
            return future
        stream = _current(self._gpu, "SimpleNotify")
        self._waits = [wait for wait in self._waits if not wait.done() or wait.exception() is not None]
        gate = self._next
        if gate in self._held and not self._gates.take(gate):
            raise InvalidArgument(f"SimpleNotify: the stream has {_GATES} holds before it: let it pass some first")
        self._gates.hold(gate, stream)
        # Opened again before it was passed, it would be opened once: so the stream says when it has passed.
        self._gates.announce(gate, stream)
        self._held.add(gate)
        self._next = (gate + 1) % _GATES

        def run() -> None:
            try:
                future.set_result(happen())
            except BaseException as error:  # Told to whoever asks; the stream must go on whatever happens.
                future.set_exception(error)
            self._gates.open(gate)

        self._waits.append(future)
        threading.Thread(target=run, name="fserver_lib notify", daemon=True).start()
        return future

    def stream_wait_event(self, handler: int) -> None:
        """What the stream does from here on comes after the request's end. What goes wrong with it
        :meth:`wait_event_done` raises; the stream goes on."""
        from . import wait

        self._check()
        self._hold_until(lambda: wait(handler))

    def wait_event_done(self) -> None:
        """Until all has come that the stream was told to wait for."""
        self._check()
        waits, self._waits = self._waits, []
        for wait in waits:
            wait.result()

    def block_now_stream(self) -> None:
        """Holds the stream here until all has come that it was told to wait for."""
        self._check()
        waits = list(self._waits)
        if waits:
            self._hold_until(lambda: [wait.exception() for wait in waits])

    def block_now_stream_and_get_batch(self) -> None:
        """Holds the stream until a batch is there, which :meth:`get_future_batch_data` gives."""
        from . import get_batch

        self._check()
        self._batch = self._hold_until(get_batch)

    def get_future_batch_data(self) -> list[Any]:
        """The batch that the stream was held for."""
        self._check()
        if self._batch is None:
            raise InvalidArgument("get_future_batch_data: no batch was asked for: block_now_stream_and_get_batch() first")
        batch, self._batch = self._batch, None
        if batch in self._waits:
            self._waits.remove(batch)
        return batch.result()


class _Mapped:
    """Pinned host memory as a GPU's array interface describes it: one address for both."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        whole = tensor.numpy() if hasattr(tensor, "is_pinned") else tensor
        self.dtype = whole.dtype
        self.__cuda_array_interface__ = {**whole.__array_interface__, "version": 3}


def map_pinned_tensor(tensor: Any, device: Any) -> Any:
    """The tensor as the device sees it; on the CPU, the tensor. For a GPU it must be pinned."""
    name = str(device)
    if not (name.isdigit() or name.startswith("cuda")):
        return tensor
    gpu = _gpu()
    index = int(name.removeprefix("cuda").removeprefix(":") or 0)
    if gpu != index:
        at = "at no GPU" if gpu is None else f"at GPU {gpu}"
        raise DeviceUnsupported(f"map_pinned_tensor: device {name}, and this process is {at} (STEPMESH_BAKCEND, STEPMESH_GPU)")
    if hasattr(tensor, "is_pinned"):
        import torch

        if not tensor.is_pinned():
            raise InvalidArgument("map_pinned_tensor: the tensor is not pinned: pin_memory() first")
        return torch.as_tensor(_Mapped(tensor), device=f"cuda:{index}")
    return _Mapped(tensor)


class _Counters:
    """The values of sequence tensors that are on the GPU: the host, which puts every change on a stream, knows them."""

    def __init__(self, gpu: int) -> None:
        self.gpu = gpu
        self.flags = _native.StreamFlags(gpu)
        #: With the tensors, so that no other comes to lie at their addresses.
        self._values: dict[int, tuple[Any, int]] = {}

    def value(self, seq: Any) -> int:
        """The value that ``seq`` has for what comes next on the stream."""
        if str(seq.dtype).rsplit(".", 1)[-1] not in ("int32", "int64"):
            raise InvalidType("seq: a flag is an int32 or an int64")
        if not self.flags.has(seq):
            return int(seq.reshape(-1)[0])
        address = _address(seq)
        if address not in self._values:
            # Asked once: this waits for the stream.
            self._values[address] = (seq, int(seq.reshape(-1)[0]))
        return self._values[address][1]

    def add_one(self, seq: Any, stream: int) -> None:
        value = self.value(seq) + 1
        self.flags.write(seq, value, stream)
        self._values[_address(seq)] = (seq, value)


_counters: _Counters | None = None


def _address(tensor: Any) -> int:
    return tensor.data_ptr() if hasattr(tensor, "data_ptr") else tensor.__cuda_array_interface__["data"][0]


def _current(gpu: int, what: str) -> int:
    """The stream that work is put on now."""
    if _streams.is_capturing(gpu):
        raise InvalidArgument(
            f"{what}: a captured graph would repeat today's value for ever: put stepmesh.Gates into it instead"
        )
    return _streams.current(gpu) or 0


def _on_gpu(*tensors: Any) -> _Counters | None:
    """Who sees to these tensors, if one of them is on the GPU."""
    global _counters
    gpu = _gpu()
    if gpu is None:
        return None
    if _counters is None or _counters.gpu != gpu:
        _counters = _Counters(gpu)
    return _counters if any(_counters.flags.has(tensor) for tensor in tensors) else None


def write_flag(flag: Any, seq: Any) -> None:
    """Sets the flag to the value of ``seq``, after all that was written before; on a GPU, after all that is on the stream."""
    if counters := _on_gpu(flag, seq):
        counters.flags.write(flag, counters.value(seq), _current(counters.gpu, "write_flag"))
        return
    _native.store_flag(flag, seq)


def wait_flag(flag: Any, seq: Any, timeout_ms: int = 10_000) -> None:
    """Waits until the flag has the value of ``seq`` or a greater one; ``Timeout`` after ``timeout_ms``. On a GPU the stream
    waits, for as long as it takes."""
    if counters := _on_gpu(flag, seq):
        counters.flags.wait(flag, counters.value(seq), _current(counters.gpu, "wait_flag"))
        return
    _native.wait_flag(flag, seq, timeout_ms / 1e3)


def seq_add_one(seq: Any) -> None:
    """Adds one to ``seq``. Of one on a GPU nothing else may change the value."""
    if counters := _on_gpu(seq):
        counters.add_one(seq, _current(counters.gpu, "seq_add_one"))
        return
    _native.add_one(seq)
