"""The connector's transfers in captured CUDA graphs. While the engine captures its step, tensors are copied between the model
and the slots and gates are put on its stream; when it launches the graph, a thread of the runtime's moves the descriptors.

A graph's rows are those of its capture: vLLM pads each batch to a size that it has captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import stepmesh

from .. import _streams
from .._native import AttentionReplays, FfnReplays
from ..errors import InvalidArgument


@dataclass(frozen=True)
class Sizes:
    """How much is provided for, and for how long a replay may take."""

    transfers: int
    graphs: int
    gpu: int
    timeout: float
    spin_us: int


@dataclass(frozen=True)
class Capture:
    """A capture of a stream: its number no other has."""

    stream: int
    number: int


def kind(tensor: Any) -> str:
    """A tensor's element type, as its framework names it."""
    return str(tensor.dtype).rpartition(".")[2]


def part_of(tensor: Any) -> Any:
    """What a transfer says of a tensor of rows."""
    row_bytes = tensor.element_size()
    for size in tensor.shape[1:]:
        row_bytes *= size
    return stepmesh.Part(tensor.shape[0], row_bytes, kind(tensor))


def _copy(to: Any, tensor: Any) -> None:
    if to.nbytes:
        stepmesh.torch(to).copy_(tensor, non_blocking=True)


class _Graphs:
    def __init__(self, replays: Any, gpu: int) -> None:
        self._replays, self._gpu = replays, gpu

    def capture(self) -> Capture | None:
        """The capture of the engine's stream, if it is being captured."""
        stream = _streams.current(self._gpu)
        number = None if stream is None else self._replays.capture(stream)
        return None if stream is None or number is None else Capture(stream, number)

    def check(self) -> None:
        """Raises what a replay has failed with."""
        self._replays.check()

    def close(self) -> None:
        """A graph that runs goes on, and its results are worth nothing."""
        self._replays.close()


class AttentionGraphs(_Graphs):
    """The attention side's."""

    def __init__(self, mesh: Any, sizes: Sizes) -> None:
        replays = AttentionReplays(mesh, sizes.transfers, sizes.graphs, sizes.gpu, sizes.timeout, sizes.spin_us)
        super().__init__(replays, sizes.gpu)
        self._mesh = mesh

    def send(self, capture: Capture, stage: int, tensors: list[Any], app: bytes) -> None:
        """Fills the stage's slot; none of ``tensors`` is a part without rows."""
        parts = []
        for index, tensor in enumerate(tensors):
            if tensor is None:
                parts.append(stepmesh.Part(0, 1))
                continue
            _copy(self._mesh.request_tensor(stage, index, list(tensor.shape), kind(tensor)), tensor)
            parts.append(part_of(tensor))
        self._replays.push_pull(capture.stream, stage, parts, app)

    def receive(self, capture: Capture, stage: int, sent: Any, ranks: list[int], out: Any) -> Any:
        """The sum of these FFN ranks' outputs, of the shape and type of ``out``, or of what was sent."""
        self._replays.wait(capture.stream, stage)
        like = sent if out is None else out
        if like.shape[0] == 0:
            return like
        slots = [self._mesh.reply_tensor(rank, stage, 0, list(sent.shape), kind(like)) for rank in ranks]
        answers = [stepmesh.torch(slot).to(like.device, non_blocking=True) for slot in slots]
        total = sum(answers[1:], start=answers[0])
        return total.clone() if out is None else out.copy_(total)


@dataclass
class Captured:
    """A transfer of a graph between its receive and its send: the rows of each attention rank that is answered here."""

    stage: int
    rows: dict[int, int]


class FfnGraphs(_Graphs):
    """The FFN side's."""

    def __init__(self, mesh: Any, sizes: Sizes, is_ours: Callable[[int], bool]) -> None:
        replays = FfnReplays(mesh, sizes.transfers, sizes.graphs, sizes.gpu, sizes.timeout, sizes.spin_us)
        super().__init__(replays, sizes.gpu)
        self._mesh, self._is_ours = mesh, is_ours

    def receive(
        self, capture: Capture, stage: int, tokens: list[int], columns: list[tuple[int, str]]
    ) -> tuple[Captured, list[list[Any]]]:
        """Tensors of each part, one for each attention rank that is answered here. ``tokens`` are the rows of every attention
        rank, ``columns`` the columns and the type of each part."""
        captured = Captured(stage, {rank: rows for rank, rows in enumerate(tokens) if self._is_ours(rank)})
        slots: dict[int, list[Any]] = {}
        requests: list[Any] = [None] * len(tokens)
        for rank, rows in captured.rows.items():
            slots[rank] = [
                self._mesh.request_tensor(rank, stage, part, [rows, width], name)
                for part, (width, name) in enumerate(columns)
            ]
            requests[rank] = [
                # Of no rows it has its type all the same.
                stepmesh.Part(rows, self._row_bytes(rank, stage, part, width, name), name)
                for part, (width, name) in enumerate(columns)
            ]
        self._replays.next_batch(capture.stream, stage, requests)
        return captured, [[slots[rank][part] for rank in captured.rows] for part in range(len(columns))]

    def _row_bytes(self, rank: int, stage: int, part: int, width: int, name: str) -> int:
        return self._mesh.request_tensor(rank, stage, part, [1, width], name).nbytes

    def send(self, capture: Capture, captured: Captured, output: Any) -> None:
        """Fills the reply slots with each attention rank's rows."""
        if output.shape[0] != sum(captured.rows.values()):
            raise InvalidArgument(f"ffn_output: {output.shape[0]} rows for {sum(captured.rows.values())} tokens")
        replies: list[Any] = [None] * (max(captured.rows, default=-1) + 1)
        start = 0
        for rank, rows in captured.rows.items():
            share = output[start : start + rows]
            _copy(self._mesh.reply_tensor(rank, captured.stage, 0, list(share.shape), kind(share)), share)
            replies[rank] = [part_of(share)]
            start += rows
        self._replays.respond(capture.stream, captured.stage, replies)
