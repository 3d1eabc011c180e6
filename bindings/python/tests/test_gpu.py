"""Slots on a GPU, on a double of the CUDA driver: a process of its own finds it in place of libcuda.so.

``STEPMESH_FAKE_CUDA`` names the double's library (``cargo build -p stepmesh-fake-cuda``). Nothing here runs on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DOUBLE = os.environ.get("STEPMESH_FAKE_CUDA")

PRELUDE = """
import ctypes, threading, time
import numpy as np
import stepmesh
from stepmesh import errors

def cuda(name, *arguments):
    answer = getattr(DRIVER, name)(*arguments)
    assert answer == 0, (name, answer)

DRIVER = ctypes.CDLL("libcuda.so")
cuda("cuInit", 0)
context = ctypes.c_void_p()
cuda("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)

def stream():
    cuda("cuCtxSetCurrent", context)
    made = ctypes.c_void_p()
    cuda("cuStreamCreate", ctypes.byref(made), 1)
    return made.value

def copy(to, source, count, on):
    cuda("cuCtxSetCurrent", context)
    cuda("cuMemcpyAsync", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(count), ctypes.c_void_p(on))

def finish(on):
    cuda("cuCtxSetCurrent", context)
    while DRIVER.cuStreamQuery(ctypes.c_void_p(on)) != 0:
        time.sleep(0.0001)
"""


@pytest.fixture
def run(tmp_path: Path):
    if not DOUBLE:
        pytest.skip("STEPMESH_FAKE_CUDA names no double of the driver")
    (tmp_path / "libcuda.so").symlink_to(DOUBLE)

    def run(program: str, driver: bool = True) -> None:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path if driver else tmp_path / "nowhere")}
        program = (PRELUDE if driver else "import stepmesh\nfrom stepmesh import errors\n") + textwrap.dedent(program)
        subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)

    return run


MESHES = """
spec = stepmesh.PartSpec(row_bytes=4096, max_rows=4)
layout = stepmesh.Layout(request=[spec], reply=[spec], microbatches=2)
PART = [stepmesh.Part(4, 4096, "float32")]
scheduler = stepmesh.Scheduler(attention=1, ffn=1)
options = stepmesh.Options(scheduler.url, layout, transport=TRANSPORT, gpu=0)
"""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_tensors_of_streams_go_there_and_back(run, transport):
    on_gpu = transport == "shm"
    run(f"TRANSPORT, ON_GPU = {transport!r}, {on_gpu}" + MESHES + """
def serve():
    own = stream()
    with stepmesh.FfnMesh(options) as mesh:
        mesh.wait_complete()
        for _ in range(50):
            while (batch := mesh.next_batch(timeout=5.0)) is None:
                pass
            for segment in batch:
                request, reply = segment.tensor(0), segment.reply(0)
                assert (request.device == "cuda:0") == ON_GPU
                copy(reply.data_ptr, request.data_ptr, request.nbytes, own)
                segment.set_reply(PART)
            finish(own)
            mesh.respond(batch)
        while not done.is_set():
            mesh.poll()

done = threading.Event()
server = threading.Thread(target=serve)
server.start()
own, gates = stream(), stepmesh.Gates(2)
with stepmesh.AttentionMesh(options) as mesh:
    mesh.wait_complete()
    result = np.zeros((4, 1024), "float32")
    for number in range(50):
        hidden = np.random.default_rng(number).random((4, 1024), dtype="float32")
        buffer = mesh.acquire(number % 2)
        slot = buffer.tensor(0, (4, 1024), "float32")
        copy(slot.data_ptr, hidden.ctypes.data, hidden.nbytes, own)
        gates.announce(number % 2, own)
        while not gates.take(number % 2):
            time.sleep(0)
        ticket = mesh.push_pull(buffer, PART, group=number)
        gates.hold(number % 2, own)
        reply = mesh.wait(ticket).tensor(0)
        copy(result.ctypes.data, reply.data_ptr, reply.nbytes, own)
        gates.open(number % 2)
        finish(own)
        assert (result == hidden).all(), number
    done.set()
    server.join()
""")


def test_a_tensor_says_where_it_is_and_numpy_refuses_it(run):
    run("TRANSPORT = 'shm'" + MESHES + """
def serve():
    with stepmesh.FfnMesh(options) as mesh:
        mesh.wait_complete()
        done.wait()

done = threading.Event()
server = threading.Thread(target=serve)
server.start()
with stepmesh.AttentionMesh(options) as mesh:
    mesh.wait_complete()
    buffer = mesh.acquire(0)
    tensor = buffer.tensor(0, (4, 1024), "float32")
    assert tensor.device == "cuda:0" and tensor.__dlpack_device__() == (2, 0) and "cuda:0" in repr(tensor)
    interface = tensor.__cuda_array_interface__
    assert interface["data"] == (tensor.data_ptr, False) and interface["shape"] == (4, 1024)
    assert interface["typestr"] == "<f4" and not hasattr(tensor, "__array_interface__")
    assert tensor.__dlpack__(stream=1) is not None and tensor.__dlpack__(max_version=(1, 0)) is not None
    for refused in (
        lambda: stepmesh.numpy(tensor), lambda: stepmesh.memory(tensor), lambda: tensor.__dlpack__(dl_device=(1, 0)),
        lambda: buffer.put(0, np.zeros((4, 1024), "float32")),
    ):
        try:
            refused()
        except errors.DeviceUnsupported as error:
            assert "cuda:0" in str(error) or "GPU" in str(error) or "part 0" in str(error), error
        else:
            raise AssertionError("it was not refused")
    done.set()
    server.join()
""")


def test_gates_that_make_no_sense_are_refused(run):
    run("""
    gates, own = stepmesh.Gates(2), stream()
    assert len(gates) == 2 and not gates.aborted
    for refused in (lambda: gates.take(2), lambda: gates.open(9), lambda: gates.hold(2, own), lambda: stepmesh.Gates(0)):
        try:
            refused()
        except errors.InvalidArgument as error:
            assert "gate" in str(error), error
        else:
            raise AssertionError("it was not refused")
    gates.hold(0, own)
    gates.abort()
    finish(own)
    assert gates.aborted
    gates.reset(own)
    assert not gates.aborted
    try:
        stepmesh.Gates(1, gpu=7)
    except errors.DeviceUnsupported as error:
        assert "GPU 7" in str(error)
    """)


def test_without_a_driver_the_error_says_what_to_install(run):
    run("""
    try:
        stepmesh.Gates(1)
    except errors.DeviceUnsupported as error:
        assert "NVIDIA driver" in str(error), error
    else:
        raise AssertionError("there is no driver")
    layout = stepmesh.Layout(request=[stepmesh.PartSpec(8, 1)], reply=[stepmesh.PartSpec(8, 1)], microbatches=1)
    with stepmesh.Scheduler(attention=1, ffn=1) as scheduler:
        try:
            stepmesh.AttentionMesh(stepmesh.Options(scheduler.url, layout, gpu=0))
        except errors.DeviceUnsupported as error:
            assert "libcuda" in str(error), error
        else:
            raise AssertionError("there is no driver")
    """, driver=False)
