"""Streams of the program's, as PyTorch knows them."""

from __future__ import annotations

import sys


def current(gpu: int | None) -> int | None:
    """The handle of the stream that PyTorch puts its work on now; none on the CPU, or where the program has no PyTorch."""
    torch = sys.modules.get("torch")
    if gpu is None or torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda.current_stream(gpu).cuda_stream


def is_capturing(gpu: int) -> bool:
    """Whether what is put on that stream now is recorded for a graph."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def finish(gpu: int) -> None:
    """Waits for all that is on that stream."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.current_stream(gpu).synchronize()
