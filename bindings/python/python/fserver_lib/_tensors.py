"""Tensors as the program knows them: PyTorch's, or NumPy's where there is no PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import stepmesh
from stepmesh._arrays import _ml_dtype, framework
from stepmesh.errors import InvalidArgument


def _numpy_dtype(name: str) -> Any:
    import numpy

    if name == "bytes":
        return numpy.uint8
    if name.startswith(("bfloat", "float8")):
        bits = numpy.uint16 if name == "bfloat16" else numpy.uint8
        return _ml_dtype(name) or bits
    return numpy.dtype(name)


def _numpy_new(name: str, shape: tuple[int, ...]) -> Any:
    import numpy

    return numpy.empty(shape, _numpy_dtype(name))


def _numpy_part(tensor: Any, offset: int, size: int, name: str, shape: tuple[int, ...]) -> Any:
    import numpy

    return tensor.reshape(-1).view(numpy.uint8)[offset : offset + size].view(_numpy_dtype(name)).reshape(shape)


def _torch_dtype(name: str) -> Any:
    import torch

    return torch.uint8 if name == "bytes" else getattr(torch, name)


def _torch_new(name: str, shape: tuple[int, ...], device: str = "cpu") -> Any:
    import torch

    return torch.empty(shape, dtype=_torch_dtype(name), device=device)


def _torch_part(tensor: Any, offset: int, size: int, name: str, shape: tuple[int, ...]) -> Any:
    import torch

    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return flat[offset : offset + size].view(_torch_dtype(name)).view(shape)


def makers(
    named: str | None, gpu: int | None = None
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """How to make a tensor, on a GPU if one is given, a view of another one's bytes, and one that lies in a slot."""
    if gpu is not None:
        if framework(named) != "torch":
            raise InvalidArgument("STEPMESH_BAKCEND=GPU makes its tensors with PyTorch, which is not installed or not chosen")
        return partial(_torch_new, device=f"cuda:{gpu}"), _torch_part, stepmesh.torch
    if framework(named) == "torch":
        import torch  # noqa: F401  # What is not imported is not recognised.

        return _torch_new, _torch_part, stepmesh.torch
    return _numpy_new, _numpy_part, stepmesh.numpy
