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

    def run(program: str, driver: bool = True, copy_us: int = 0) -> None:
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(tmp_path if driver else tmp_path / "nowhere"),
            "STEPMESH_FAKE_CUDA_COPY_US": str(copy_us),
        }
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


FSERVER = """
from stepmesh import _native

class Cuda:
    # A tensor on the GPU, as CuPy would show it.
    def __init__(self, shape, dtype, index=0):
        self.shape, self.dtype, self.index = tuple(shape), np.dtype(dtype), index
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.address = ctypes.c_uint64()
        cuda("cuCtxSetCurrent", context)
        cuda("cuMemAlloc_v2", ctypes.byref(self.address), ctypes.c_size_t(max(self.nbytes, 1)))
        self.__cuda_array_interface__ = {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.address.value, False),
        }
    def __dlpack_device__(self):
        return (2, self.index)
    def set(self, array, on):
        copy(self.address.value, array.ctypes.data, self.nbytes, on)
        return self
    def get(self, on):
        array = np.zeros(self.shape, self.dtype)
        copy(array.ctypes.data, self.address.value, self.nbytes, on)
        finish(on)
        return array

def options(scheduler, rank=None):
    return stepmesh.Options(scheduler.url, None, transport=TRANSPORT, gpu=0, rank=rank)

def serve(scheduler, done, answer):
    server = _native.Server(options(scheduler), 4, 1 << 20, lambda name, shape: Cuda(shape, name), None, None, False)
    server.wait_complete(30.0)
    while not done.is_set():
        for handler, tensors, keys in server.get_batch(0.05) or []:
            answer(server, handler, tensors, keys)
    server.close()
"""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_fserver_moves_tensors_of_a_gpu_behind_the_streams(run, transport):
    run(f"TRANSPORT = {transport!r}" + FSERVER + """
def answer(server, handler, tensors, keys):
    own = streams["server"]
    gate.hold(0, own)                        # What computes the answer has not run when it is given away.
    computed = tensors[0].get(reader) * 2 + tensors[1].get(reader)
    result = Cuda(tensors[0].shape, "float32").set(computed, own)
    keep.extend([computed, result])
    server.respond([result], handler, own)
    gate.open(0)

streams, keep = {"server": stream()}, []
reader, gate = stream(), stepmesh.Gates(2)
scheduler, done = stepmesh.Scheduler(1, 1), threading.Event()
serving = threading.Thread(target=serve, args=(scheduler, done, answer))
serving.start()
worker = _native.Worker(options(scheduler), 4, 1 << 20, 10.0)
worker.wait_complete(30.0)
own = stream()
for number in range(40):
    rng = np.random.default_rng(number)
    rows = int(rng.integers(1, 9))
    hidden, bias = rng.random((rows, 1024), "float32"), np.full((rows, 1024), number, "float32")
    push, host, pull = Cuda(hidden.shape, "float32"), bias, Cuda(hidden.shape, "float32")
    gate.hold(1, own)                        # Neither has what makes the request.
    push.set(hidden, own)
    handler = worker.push_pull([push, host], [1, 2], [pull], [3], own)
    time.sleep(0.001)
    gate.open(1)
    worker.wait(handler, 10.0)
    assert (pull.get(reader) == hidden * 2 + number).all(), number
    stamps, copied = worker.trace(handler)
    assert copied == 6 * hidden.nbytes and stamps[0] <= stamps[1] <= stamps[6] <= stamps[7]
done.set()
serving.join()
worker.close()
scheduler.close()
""")


def test_a_copy_is_waited_for_and_not_until_the_next_look_at_signals(run):
    run("""TRANSPORT = "shm"
""" + FSERVER + """
def answer(server, handler, tensors, keys):
    server.respond(tensors, handler, None)

scheduler, done = stepmesh.Scheduler(1, 1), threading.Event()
serving = threading.Thread(target=serve, args=(scheduler, done, answer))
serving.start()
worker = _native.Worker(options(scheduler), 4, 1 << 20, 10.0)
worker.wait_complete(30.0)
push, pull, times = Cuda((1024, 256), "float32"), Cuda((1024, 256), "float32"), []
for _ in range(20):
    began = time.perf_counter()
    worker.wait(worker.push_pull([push], [1], [pull], [2], None), 10.0)
    times.append(time.perf_counter() - began)
assert sorted(times)[10] < 0.05, times       # A look at signals is due every 0.1 s.
done.set()
serving.join()
worker.close()
scheduler.close()
""", copy_us=1000)


def test_a_worker_that_leaves_keeps_what_a_stream_may_still_write(run):
    run("""TRANSPORT = "shm"
""" + FSERVER + """
scheduler, done = stepmesh.Scheduler(1, 1), threading.Event()
serving = threading.Thread(target=serve, args=(scheduler, done, lambda *_: None))
serving.start()
worker = _native.Worker(options(scheduler), 4, 1 << 20, 10.0)
worker.wait_complete(30.0)
own, gate = stream(), stepmesh.Gates(1)
gate.hold(0, own)
push = Cuda((256, 256), "float32")
worker.push_pull([push], [1], [], [], own)
worker.close()
done.set()
serving.join()
gate.open(0)                                 # Only now is the slot written.
finish(own)
""")


def test_tensors_of_another_gpu_and_of_none_are_refused_by_name(run):
    run("""TRANSPORT = "shm"
""" + FSERVER + """
scheduler, done = stepmesh.Scheduler(1, 1), threading.Event()
serving = threading.Thread(target=serve, args=(scheduler, done, lambda *_: None))
serving.start()
worker = _native.Worker(options(scheduler), 4, 1 << 20, 10.0)
worker.wait_complete(30.0)
for tensor, words in ((Cuda((2, 2), "float32", index=3), "GPU 3"), (Cuda((2, 2), "float16"), None)):
    try:
        worker.push_pull([np.zeros(4, "float32"), tensor], [1, 2], [], [])
    except errors.DeviceUnsupported as error:
        assert words and words in str(error) and "push_tensors[1]" in str(error), error
    else:
        assert words is None
done.set()
serving.join()
worker.close()
""")


def test_notifications_hold_a_stream_and_flags_are_set_by_it(run):
    run("""
import fserver_lib as f
from fserver_lib import _notify, _streams

own, reader = stream(), stream()
_notify._gpu = lambda: 0
_streams.current = lambda gpu: own
ended = threading.Event()
f.wait = lambda handler: ended.wait(10)

marker = np.zeros(1, "int64")
cuda("cuCtxSetCurrent", context)
cuda("cuMemHostRegister_v2", ctypes.c_void_p(marker.ctypes.data), ctypes.c_size_t(8), 0)
flag = f.map_pinned_tensor(marker, 'cuda:0')

notify = f.SimpleNotify()
try:
    notify.stream_wait_event(1)
except errors.InvalidArgument as error:
    assert "init()" in str(error)
notify.init()
one = np.ones(1, "int64")
notify.stream_wait_event(7)
notify.block_now_stream()
f.write_flag(flag, one)
time.sleep(0.02)
assert marker[0] == 0                        # The stream is held.
ended.set()
notify.wait_event_done()
finish(own)
assert marker[0] == 1

f.wait_flag(flag, 2 * one)                   # Returns at once; what follows on the stream waits.
after = np.zeros(1, "int64")
cuda("cuMemHostRegister_v2", ctypes.c_void_p(after.ctypes.data), ctypes.c_size_t(8), 0)
f.write_flag(f.map_pinned_tensor(after, 0), 5 * one)
time.sleep(0.02)
assert after[0] == 0
marker[0] = 2
finish(own)
assert after[0] == 5

f.get_batch = lambda: [(1, [], [])]
notify.block_now_stream_and_get_batch()
assert notify.get_future_batch_data() == [(1, [], [])]
for _ in range(200):                         # Far more than there are gates.
    notify.stream_wait_event(7)
    finish(own)
notify.wait_event_done()

def fails(handler):
    raise errors.Timeout("no answer")
f.wait = fails
notify.stream_wait_event(8)
try:
    notify.wait_event_done()
except errors.Timeout as error:
    assert "no answer" in str(error)
else:
    raise AssertionError("it is to be told")
finish(own)                                  # It goes on all the same.

for refused in (lambda: f.write_flag(flag, one.astype("float32")), lambda: f.map_pinned_tensor(marker, "cuda:3")):
    try:
        refused()
    except (errors.InvalidType, errors.DeviceUnsupported):
        pass
    else:
        raise AssertionError("it was not refused")
_streams.is_capturing = lambda gpu: True
try:
    f.write_flag(flag, one)
except errors.InvalidArgument as error:
    assert "stepmesh.Gates" in str(error)
""")


#: As much of PyTorch as the connector uses, on the double: tensors on the GPU, a current stream for each thread.
TORCH = """
import types

arena, used, lock = ctypes.c_uint64(), 0, threading.Lock()
cuda("cuCtxSetCurrent", context)
cuda("cuMemAlloc_v2", ctypes.byref(arena), ctypes.c_size_t(16 << 20))

def take(count):
    global used
    with lock:
        used += -(-count // 64) * 64
        return arena.value + used - -(-count // 64) * 64

class Tensor:
    def __init__(self, shape, dtype, address=None, hold=None, device="cuda:0"):
        self.shape, self.dtype, self.device, self.hold = tuple(shape), dtype, device, hold
        self.is_cuda = device != "cpu"
        self.size = np.dtype(str(dtype).rpartition(".")[2]).itemsize
        self.address = take(self.nbytes) if address is None else address
    @property
    def nbytes(self):
        return int(np.prod(self.shape)) * self.size
    def __len__(self):
        return self.shape[0]
    def element_size(self):
        return self.size
    def __getitem__(self, rows):
        start, end, _ = rows.indices(len(self))
        row = self.nbytes // max(len(self), 1)
        return Tensor((end - start, *self.shape[1:]), self.dtype, self.address + start * row, self, self.device)
    def copy_(self, other, non_blocking=False):
        assert self.nbytes == other.nbytes and self.dtype == other.dtype
        copy(self.address, other.address, self.nbytes, mine.stream)
        if other.device == "cpu" and not non_blocking:
            finish(mine.stream)
        return self
    def clone(self):
        return self.to("cuda:0", copy=True)
    def to(self, device, non_blocking=False, copy=False):
        assert device == "cuda:0"
        return Tensor(self.shape, self.dtype).copy_(self, non_blocking) if copy or device != self.device else self
    def cpu(self):
        return self
    def numpy(self):
        array = np.zeros(self.shape, str(self.dtype).rpartition(".")[2])
        copy(array.ctypes.data, self.address, self.nbytes, mine.stream)
        finish(mine.stream)
        return array
    def set(self, array):
        copy(self.address, np.ascontiguousarray(array).ctypes.data, self.nbytes, mine.stream)
        finish(mine.stream)

def frombuffer(data, dtype):
    array = np.frombuffer(data, "uint8")
    return Tensor(array.shape, dtype, array.ctypes.data, array, "cpu")

def cat(tensors):
    whole, start = Tensor((sum(map(len, tensors)), *tensors[0].shape[1:]), tensors[0].dtype), 0
    for tensor in tensors:
        whole[start : start + len(tensor)].copy_(tensor)
        start += len(tensor)
    return whole

class Stream:
    def __init__(self, handle):
        self.cuda_stream = handle
    def synchronize(self):
        finish(self.cuda_stream)

mine = threading.local()
torch = types.ModuleType("torch")
torch.Tensor, torch.frombuffer, torch.cat = Tensor, frombuffer, cat
torch.float32, torch.uint8, torch.bfloat16 = "torch.float32", "torch.uint8", "torch.bfloat16"
torch.empty = lambda shape, dtype, device: Tensor(shape, dtype, device=str(device))
torch.from_dlpack = lambda slot: Tensor(slot.shape, "torch." + slot.dtype, slot.data_ptr, slot, slot.device)
torch.cuda = types.SimpleNamespace(
    is_available=lambda: True, current_stream=lambda gpu: Stream(mine.stream), is_current_stream_capturing=lambda: capturing())
sys.modules["torch"] = torch

def capturing():
    status = ctypes.c_int()
    cuda("cuCtxSetCurrent", context)
    cuda("cuStreamGetCaptureInfo_v2", ctypes.c_void_p(mine.stream), ctypes.byref(status), ctypes.byref(ctypes.c_uint64()),
         None, None, None)
    return status.value == 1

def capture(body):
    graph, made = ctypes.c_void_p(), ctypes.c_void_p()
    cuda("cuCtxSetCurrent", context)
    cuda("cuStreamBeginCapture_v2", ctypes.c_void_p(mine.stream), 0)
    result = body()
    cuda("cuCtxSetCurrent", context)
    cuda("cuStreamEndCapture", ctypes.c_void_p(mine.stream), ctypes.byref(graph))
    cuda("cuGraphInstantiateWithFlags", ctypes.byref(made), graph, ctypes.c_ulonglong(0))
    return made, result

def launch(graph):
    cuda("cuCtxSetCurrent", context)
    cuda("cuGraphLaunch", graph, ctypes.c_void_p(mine.stream))

from stepmesh.vllm import StepMeshAFDConnector, TransferContext, TransferMetadata

LAYERS, STAGES, HIDDEN = 6, 3, 16
def connector(role, rank, **more):
    afd = types.SimpleNamespace(
        role=role, host="127.0.0.1", port=PORT, afd_server_rank=rank, num_attention_servers=A, num_ffn_servers=F,
        num_afd_stages=STAGES, afd_extra_config=dict(
            hidden_size=HIDDEN, max_tokens=8, element_bytes=4, timeout=20.0, transport=TRANSPORT, tensors="torch",
            reduce="paired", gpu=0, graphs=3) | more)
    model = types.SimpleNamespace(dtype=torch.float32, hf_config=types.SimpleNamespace(num_hidden_layers=LAYERS))
    made = StepMeshAFDConnector(rank, 0, types.SimpleNamespace(afd_config=afd, model_config=model))
    made.init_afd_connector()
    return made

def counts(tokens):
    of_stage = types.SimpleNamespace(num_tokens_across_dp_cpu=[tokens + rank for rank in range(A)])
    return types.SimpleNamespace(dp_metadata_list={stage: of_stage for stage in range(STAGES)})

def turned(hidden):
    # The "FFN": each row turned by one element, by copies.
    out, row = Tensor(hidden.shape, hidden.dtype), 4 * HIDDEN
    for index in range(len(hidden)):
        to, source = out.address + index * row, hidden.address + index * row
        copy(to, source + 4, row - 4, mine.stream)
        copy(to + row - 4, source, 4, mine.stream)
    return out

def ffn_layers(mesh, layers=LAYERS):
    keep = []
    for layer in range(layers):
        for stage in range(STAGES):
            payload = mesh.recv_attn_output(ubatch_idx=stage)
            keep += [payload.hidden_states, turned(payload.hidden_states)]
            mesh.send_ffn_output(keep[-1], payload.context)
    return keep

def attention_layers(mesh, states, layers=LAYERS):
    for layer in range(layers):
        for stage, state in enumerate(states):
            metadata = TransferMetadata.create_attention_metadata(layer_idx=layer, stage_idx=stage, seq_len=len(state))
            mesh.send_attn_output(state, TransferContext(metadata))
        for stage, state in enumerate(states):
            assert mesh.recv_ffn_output(state, ubatch_idx=stage) is state

def start(*sides):
    failed = []
    def guarded(side, *arguments):
        mine.stream = stream()
        try:
            side(*arguments)
        except BaseException:
            failed.append(traceback.format_exc())
    threads = [threading.Thread(target=guarded, args=side) for side in sides]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed, failed[0]

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]
"""


@pytest.mark.parametrize("transport, attention, ffn", [("shm", 2, 1), ("shm", 2, 2), ("tcp", 1, 1)])
def test_the_vllm_connector_is_captured_and_replayed(run, transport, attention, ffn):
    run(f"TRANSPORT, A, F = {transport!r}, {attention}, {ffn}\nimport socket, sys, traceback\n" + TORCH + """
STEPS = [step % 3 for step in range(60)]     # 0: eagerly, 1 and 2: a graph of so many tokens, and its rank more.

def serve(rank):
    mesh, graphs = connector("ffn", rank), {}
    for tokens in (1, 2):
        mesh.control_plane.update_state_from_dp_metadata(counts(tokens))
        graphs[tokens] = capture(lambda: ffn_layers(mesh))
    for step in STEPS:
        plan = mesh.control_plane.recv_dp_metadata_list()
        assert plan == {"step": step}
        keep = launch(graphs[step][0]) if step else ffn_layers(mesh)
    mesh.receive_control()
    finish(mine.stream)
    mesh.close()

def ask(rank):
    mesh, graphs, states = connector("attention", rank), {}, {}
    for tokens in (1, 2):
        states[tokens] = [Tensor((tokens + rank, HIDDEN), torch.float32) for _ in range(STAGES)]
        graphs[tokens] = capture(lambda: attention_layers(mesh, states[tokens]))
    states[0] = [Tensor((stage, HIDDEN), torch.float32) for stage in range(STAGES)]
    for number, step in enumerate(STEPS):
        values = [np.random.default_rng(number * 7 + stage + 100 * rank).random(state.shape, "float32")
                  for stage, state in enumerate(states[step])]
        for state, value in zip(states[step], values):
            state.set(value)
        mesh.control_plane.send_dp_metadata_list({"step": step})
        if step:
            launch(graphs[step][0])
        else:
            attention_layers(mesh, states[0])
        finish(mine.stream)
        for state, value in zip(states[step], values):
            assert (state.numpy() == np.roll(value, -LAYERS, axis=1)).all(), (number, step)
    mesh.send_control(b"bye")
    time.sleep(0.3)
    mesh.close()

start(*[(serve, rank) for rank in range(F)], *[(ask, rank) for rank in range(A)])
""")


def test_a_captured_step_that_cannot_be_replayed_says_why_and_holds_no_stream(run):
    run("TRANSPORT, A, F = 'shm', 1, 1\nimport socket, sys, traceback\n" + TORCH + """
def refused(error, words, call):
    try:
        call()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"{words}: it was not refused")

mismatch, ended = threading.Event(), threading.Event()
def serve():
    mesh = connector("ffn", 0)
    refused(errors.InvalidArgument, "control plane", lambda: capture(lambda: ffn_layers(mesh)))
    mine.stream = stream()                   # That capture is left open.
    mesh.control_plane.update_state_from_dp_metadata(counts(2))
    graph, _ = capture(lambda: ffn_layers(mesh))
    launch(graph)
    finish(mine.stream)                      # Wrong rows: it goes on, and the next call says so.
    refused(errors.InvalidArgument, "rows=1", lambda: mesh.recv_attn_output(ubatch_idx=0))
    launch(graph)
    finish(mine.stream)
    refused(errors.InvalidArgument, "the graph takes", lambda: mesh.receive_control())
    mismatch.set()
    ended.wait(20)
    mesh.close()

def ask():
    mesh = connector("attention", 0)
    states = [Tensor((1, HIDDEN), torch.float32) for _ in range(STAGES)]
    refused(errors.PeerFailed, "out of step", lambda: attention_layers(mesh, states))
    mismatch.wait(20)
    ended.set()
    mesh.close()

start((serve,), (ask,))

ready = threading.Event()
def vanish():
    mesh = connector("ffn", 0)
    mesh.control_plane.update_state_from_dp_metadata(counts(1))
    ready.wait(20)
    ffn_layers(mesh, 2)
    mesh.close()

def is_left():
    mesh = connector("attention", 0)
    states = [Tensor((1, HIDDEN), torch.float32) for _ in range(STAGES)]
    def given_up():
        mesh.send_attn_output(states[0], TransferContext(TransferMetadata(0, 0, [1])))
        refused(errors.InvalidArgument, "under way", lambda: mesh.send_attn_output(
            states[0], TransferContext(TransferMetadata(0, 0, [1]))))
    capture(given_up)                        # Nothing of it is left for the next.
    for _ in range(2):
        graph, _ = capture(lambda: attention_layers(mesh, states))
    refused(errors.InvalidArgument, "graphs: 3", lambda: capture(lambda: attention_layers(mesh, states)))
    mine.stream = stream()
    ready.set()
    launch(graph)
    finish(mine.stream)                      # It ends, though nobody answers.
    for _ in range(100):
        try:
            mesh.send_attn_output(states[0], TransferContext(TransferMetadata(0, 0, [1])))
            mesh.recv_ffn_output(states[0])
        except errors.StepmeshError as error:
            lost = error
            break
    assert isinstance(lost, (errors.PeerLost, errors.NotLinked, errors.PeerFailed, errors.TransportFailed)), lost
    mesh.close()

start((vanish,), (is_left,))
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
