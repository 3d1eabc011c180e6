"""A slot's tensor as NumPy, PyTorch or a memoryview sees it: the same memory, no copy."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from .errors import DeviceUnsupported


def _ml_dtype(name: str) -> Any:
    try:
        import ml_dtypes
    except ImportError:
        return None
    return getattr(ml_dtypes, name, None)


def _on_host(tensor: Any, whose: str) -> None:
    if tensor.device != "cpu":
        raise DeviceUnsupported(f"the tensor is on {tensor.device}: {whose} cannot see it")


def to_numpy(tensor: Any) -> Any:
    """NumPy's view. bfloat16 and FP8 need ``ml_dtypes``; without it they appear as unsigned integers."""
    import numpy

    _on_host(tensor, "NumPy")
    array = numpy.asarray(tensor)
    if tensor.dtype.startswith(("bfloat", "float8")):
        dtype = _ml_dtype(tensor.dtype)
        if dtype is not None:
            return array.view(dtype)
    return array


def to_torch(tensor: Any) -> Any:
    """PyTorch's view, on the CPU or the GPU that the slot is on. PyTorch knows no read-only memory: writing where ``tensor.readonly`` is true ends the process."""
    import torch

    if tensor.nbytes == 0:
        dtype = torch.uint8 if tensor.dtype == "bytes" else getattr(torch, tensor.dtype)
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    if tensor.dtype.startswith("float8"):
        bits = torch.from_dlpack(tensor.view(tensor.shape, "uint8"))
        return bits.view(getattr(torch, tensor.dtype))
    return torch.from_dlpack(tensor)


def to_memoryview(tensor: Any) -> memoryview:
    """The bytes, by the buffer protocol."""
    _on_host(tensor, "the buffer protocol")
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr)
    array._tensor = tensor  # Keeps the memory in being for as long as the view is.
    view = memoryview(array).cast("B")
    return view.toreadonly() if tensor.readonly else view


def framework(name: str | None) -> str:
    """``torch`` or ``numpy``: as asked for, or what the program uses."""
    if name is not None:
        if name not in ("torch", "numpy"):
            raise ValueError(f"STEPMESH_TENSORS: {name!r}: torch or numpy")
        return name
    if "torch" in sys.modules:
        return "torch"
    import importlib.util

    return "torch" if importlib.util.find_spec("torch") else "numpy"
