"""Signals between a stream and the host. On the CPU the calling thread is the stream: what it waits for, it waits for."""

from __future__ import annotations

from typing import Any

from stepmesh import _native
from stepmesh.errors import DeviceUnsupported, InvalidArgument


class SimpleNotify:
    """Orders a stream after a request, or after the next batch."""

    def __init__(self) -> None:
        self._ready = False
        self._waited: int | None = None
        self._batch: list[Any] | None = None

    def init(self) -> None:
        """Makes it ready."""
        self._ready = True

    def _check(self) -> None:
        if not self._ready:
            raise InvalidArgument("SimpleNotify: init() has not been called")

    def stream_wait_event(self, handler: int) -> None:
        """What the stream does from here on comes after the request's end."""
        from . import wait

        self._check()
        wait(handler)
        self._waited = handler

    def wait_event_done(self) -> None:
        """Until the stream has passed what it was told to wait for."""
        self._check()

    def block_now_stream(self) -> None:
        """Holds the stream here until the host goes on; on the CPU the host is here already."""
        self._check()

    def block_now_stream_and_get_batch(self) -> None:
        """Holds the stream until a batch is there, which :meth:`get_future_batch_data` gives."""
        from . import get_batch

        self._check()
        self._batch = get_batch()

    def get_future_batch_data(self) -> list[Any]:
        """The batch that the stream was held for."""
        self._check()
        if self._batch is None:
            raise InvalidArgument("get_future_batch_data: no batch was asked for: block_now_stream_and_get_batch() first")
        batch, self._batch = self._batch, None
        return batch


def map_pinned_tensor(tensor: Any, device: Any) -> Any:
    """The tensor as the device sees it; on the CPU, the tensor."""
    name = str(device)
    if name.isdigit() or name.startswith("cuda"):
        raise DeviceUnsupported(f"map_pinned_tensor: device {name}, and this build moves host memory")
    return tensor


def write_flag(flag: Any, seq: Any) -> None:
    """Sets the flag to the value of ``seq``, after all that was written before."""
    _native.store_flag(flag, seq)


def wait_flag(flag: Any, seq: Any, timeout_ms: int = 10_000) -> None:
    """Waits until the flag has the value of ``seq`` or a greater one; ``Timeout`` after ``timeout_ms``."""
    _native.wait_flag(flag, seq, timeout_ms / 1e3)


def seq_add_one(seq: Any) -> None:
    """Adds one to ``seq``."""
    _native.add_one(seq)
