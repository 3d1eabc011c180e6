"""stepmesh: hidden states between attention and FFN instances, and back.

An attention instance::

    with stepmesh.AttentionMesh(options) as mesh:
        mesh.wait_complete()
        buffer = mesh.acquire(0)                         # microbatch 0's send slot, in registered memory
        stepmesh.numpy(buffer.tensor(0, (rows, 7168), "float32"))[:] = hidden
        ticket = mesh.push_pull(buffer, [stepmesh.Part(rows, 7168 * 4, "float32")], group=layer)
        reply = mesh.wait(ticket)                        # without the interpreter's lock
        partial = stepmesh.numpy(reply.tensor(rank=0))   # where it landed, until microbatch 0 is pushed again

An FFN instance::

    with stepmesh.FfnMesh(options) as mesh:
        while (batch := mesh.next_batch(timeout=1.0)) is not None:
            for segment in batch:
                x = stepmesh.numpy(segment.tensor(0))
                stepmesh.numpy(segment.reply(0, x.shape, "float32"))[:] = experts(x)
                segment.set_reply([stepmesh.Part(len(x), x.nbytes // len(x), "float32")])
            mesh.respond(batch)

Any thread may use a mesh; one that waits does not keep others out. ``fserver_lib`` is StepMesh's module on top of it.
"""

from __future__ import annotations

import asyncio
import atexit
from typing import Any, Sequence

from . import errors
from ._arrays import to_memoryview, to_numpy, to_torch
from ._native import (
    AttentionMesh as _AttentionMesh,
    AttentionReplays,
    Batch,
    FfnMesh as _FfnMesh,
    FfnReplays,
    Gates,
    Part,
    Reply,
    Scheduler,
    Segment,
    SendBuffer,
    Tensor,
    Ticket,
    __version__,
    end as _end,
    log_to_stderr,
)
from .config import Layout, Options, PartSpec
from .errors import *  # noqa: F403

atexit.register(_end)

numpy = to_numpy
torch = to_torch
memory = to_memoryview


class AttentionMesh(_AttentionMesh):
    """An attention instance in a mesh; a context manager that leaves it at the end."""

    async def wait_async(self, ticket: Ticket, timeout: float | None = 10.0) -> Reply:
        """As ``wait``, for a coroutine: a thread of the loop's executor waits."""
        return await asyncio.get_running_loop().run_in_executor(None, self.wait, ticket, timeout)

    async def acquire_async(self, microbatch: int = 0, timeout: float | None = 10.0) -> SendBuffer:
        """As ``acquire``, for a coroutine."""
        return await asyncio.get_running_loop().run_in_executor(None, self.acquire, microbatch, timeout)

    async def next_event_async(self, timeout: float | None = None) -> dict[str, Any] | None:
        """As ``next_event``, for a coroutine."""
        return await asyncio.get_running_loop().run_in_executor(None, self.next_event, timeout)


class FfnMesh(_FfnMesh):
    """An FFN instance in a mesh; a context manager that leaves it at the end."""

    async def next_batch_async(
        self, policy: Any = "all", timeout: float | None = 1.0, microbatches: Sequence[int] | None = None
    ) -> Batch | None:
        """As ``next_batch``, for a coroutine: a thread of the loop's executor waits."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self.next_batch, policy, timeout, microbatches)

    async def next_event_async(self, timeout: float | None = None) -> dict[str, Any] | None:
        """As ``next_event``, for a coroutine."""
        return await asyncio.get_running_loop().run_in_executor(None, self.next_event, timeout)


__all__ = [
    "AttentionMesh",
    "AttentionReplays",
    "Batch",
    "FfnMesh",
    "FfnReplays",
    "Gates",
    "Layout",
    "Options",
    "Part",
    "PartSpec",
    "Reply",
    "Scheduler",
    "Segment",
    "SendBuffer",
    "Tensor",
    "Ticket",
    "__version__",
    "errors",
    "log_to_stderr",
    "memory",
    "numpy",
    "torch",
    *(name for name in vars(errors) if isinstance(getattr(errors, name), type)),
]
