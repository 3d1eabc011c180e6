"""What cannot be right is refused by name, and disturbs nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import stepmesh
from stepmesh import errors

ECHO = """
f.init()
while batch := f.get_batch():
    for handler, tensors, _ in batch:
        f.respond(tensors, handler)
f.stop()
"""


def refused(body: str) -> str:
    """A worker's program of attempts that must fail, followed by a request that must not."""
    return (
        """
def refuses(error, words, call):
    try:
        call()
    except error as raised:
        assert words in str(raised), (words, str(raised))
    else:
        raise AssertionError(f"not refused: {words}")
f.init()
one, two = tensor(np.ones((2, 3), np.float32)), tensor(np.zeros((2, 3), np.float32))
"""
        + body
        + """
f.wait(f.push_pull([one], [1], [two], [2]))
assert (array(two) == 1).all()
f.stop()
"""
    )


def test_wrong_tensors_keys_and_handlers_are_refused_by_name(deploy, run):
    worker = refused(
        """
strided = tensor(np.zeros((3, 4), np.float32)).T
refuses(ValueError, "push_tensors[1]: the tensor is not contiguous", lambda: f.push_pull([one, strided], [1, 5], [two], [2]))
refuses(ValueError, "pull_tensors[0]: the tensor is not contiguous", lambda: f.push_pull([one], [1], [strided], [2]))
refuses(TypeError, "element type", lambda: f.push_pull([tensor(np.zeros(2, np.complex64))], [1], [two], [2]))
refuses(TypeError, "push_tensors[0]: list is no tensor", lambda: f.push_pull([[1.0]], [1], [two], [2]))
refuses(TypeError, "push_keys[0]", lambda: f.push_pull([one], ["a"], [two], [2]))
refuses(TypeError, "push_keys[0]", lambda: f.push_pull([one], [-1], [two], [2]))
refuses(ValueError, "push_keys: 2 keys for 1 tensors", lambda: f.push_pull([one], [1, 3], [two], [2]))
refuses(ValueError, "push_keys[1]: key 1 is there twice", lambda: f.push_pull([one, one], [1, 1], [two], [2]))
refuses(ValueError, "raise STEPMESH_SLOT_BYTES", lambda: f.push_pull([tensor(np.zeros(1 << 21, np.uint8))], [9], [], []))
refuses(ValueError, "raise STEPMESH_SLOT_BYTES", lambda: f.push_pull([], [], [tensor(np.zeros(1 << 21, np.uint8))], [9]))
refuses(ValueError, "send fewer tensors", lambda: f.push_pull([one] * 900, range(1000, 1900), [two], [2]))
f.wait(f.push_pull([one], [77], [two], [78]))
wide = tensor(np.ones((2, 4), np.float32))
refuses(ValueError, "key 77 stands for rows of 12 bytes", lambda: f.push_pull([wide], [77], [two], [78]))
refuses(ValueError, "key 77 stands for rows", lambda: f.push_pull([tensor(np.ones((2, 3), np.int32))], [77], [two], [78]))
refuses(LookupError, "handler: 999 is unknown", lambda: f.wait(999))
refuses(LookupError, "handler: 999 is unknown", lambda: f.get_all_handlers(999))
refuses(LookupError, "handler: 999 is unknown", lambda: f.fetch_trace(999))
refuses(errors.WrongRole, "only a server", f.get_batch)
refuses(errors.WrongRole, "only a server", lambda: f.respond([one], 1))
refuses(errors.WrongRole, "the barrier is for others", lambda: f.barrier(True, False))
refuses(ValueError, "nobody", lambda: f.barrier(False, False))
refuses(ValueError, "called already", f.init)
"""
    )
    run(deploy(1, 1), worker, ECHO)


def test_wrong_answers_are_refused_and_can_be_put_right(deploy, run):
    server = """
    def refuses(error, words, call):
        try:
            call()
        except error as raised:
            assert words in str(raised), (words, str(raised))
        else:
            raise AssertionError(f"not refused: {words}")
    f.init()
    refuses(errors.WrongRole, "only a worker", lambda: f.push_pull([], [], [], []))
    refuses(ValueError, "worker_ranks: 5", lambda: f.register_recv_buffer(tensor(np.zeros(8, np.uint8)), [5], [1]))
    refuses(ValueError, "equal shares", lambda: f.register_recv_buffer(tensor(np.zeros(7, np.uint8)), [0, 0], [1, 2]))
    (handler, tensors, _), = f.get_batch()
    answer = tensor(array(tensors[0]).copy())
    refuses(LookupError, "handler: 55", lambda: f.respond([answer], 55))
    refuses(ValueError, "tensors: 2 for 1 pulls", lambda: f.respond([answer, answer], handler))
    refuses(TypeError, "tensors[0]: int32 for key 2", lambda: f.respond([tensor(np.zeros((2, 3), np.int32))], handler))
    refuses(ValueError, "tensors[0]: 48 bytes for key 2", lambda: f.respond([tensor(np.zeros((4, 3), np.float32))], handler))
    f.respond([answer], handler)
    refuses(LookupError, "answered already", lambda: f.respond([answer], handler))
    f.stop()
    """
    run(deploy(1, 1), refused(""), server)


def test_a_push_that_outgrows_its_registered_buffer_fails_its_worker_alone(deploy, run):
    server = """
    f.init()
    f.register_recv_buffer(tensor(np.zeros((2, 3), np.float32)), [0], [1])
    while batch := f.get_batch():
        for handler, tensors, _ in batch:
            f.respond(tensors, handler)
    f.stop()
    """
    worker = refused(
        """
large = tensor(np.ones((4, 3), np.float32))
handler = f.push_pull([large], [1], [tensor(np.zeros((4, 3), np.float32))], [9])
refuses(errors.PeerFailed, "48 bytes were pushed into a registered buffer of 24", lambda: f.wait(handler))
"""
    )
    run(deploy(1, 1), worker, server)


def program(text: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", text],
        env={**{k: v for k, v in os.environ.items() if not k.startswith(("DMLC_", "STEPMESH_"))}, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


FULL = {
    "DMLC_ROLE": "worker",
    "DMLC_PS_ROOT_URI": "127.0.0.1",
    "DMLC_PS_ROOT_PORT": "1",
    "DMLC_NUM_WORKER": "1",
    "DMLC_NUM_SERVER": "1",
    "STEPMESH_INIT_TIMEOUT": "0.2",
}


@pytest.mark.parametrize("missing", [name for name in FULL if name.startswith("DMLC_")])
def test_a_missing_variable_is_named(missing):
    environment = {name: value for name, value in FULL.items() if name != missing}
    assert f"{missing} is not set" in program("import fserver_lib as f; f.init()", **environment)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("DMLC_ROLE", "joker", "DMLC_ROLE: 'joker'"),
        ("DMLC_NUM_WORKER", "two", "DMLC_NUM_WORKER: 'two' is no number"),
        ("DMLC_NODE_RANK", "7", "rank 7"),
        ("STEPMESH_TRANSPORT", "pigeon", "STEPMESH_TRANSPORT: 'pigeon'"),
        ("STEPMESH_BAKCEND", "GPU", "libcuda"),
        ("STEPMESH_BAKCEND", "TPU", "STEPMESH_BAKCEND: 'TPU'"),
        ("DMLC_PS_ROOT_URI", "no.such.host.invalid", "cannot be resolved"),
        ("STEPMESH_TOKEN", "two words", "token"),
    ],
)
def test_a_wrong_variable_is_named(name, value, words):
    assert words in program("import fserver_lib as f; f.init()", **{**FULL, name: value})


def test_a_scheduler_that_is_not_there_is_an_error_within_the_time_given():
    printed = program("import fserver_lib as f; f.init()", **FULL)
    assert "SchedulerLost" in printed and "127.0.0.1:1" in printed


def test_an_open_scheduler_wants_a_token_or_a_word():
    printed = program("import fserver_lib as f; f.init()", **{**FULL, "DMLC_ROLE": "scheduler", "DMLC_PS_ROOT_URI": "0.0.0.0"})
    assert "set STEPMESH_TOKEN" in printed


@pytest.mark.parametrize("call", ["f.get_batch()", "f.wait(1)", "f.stop()", "f.barrier(True, True)", "f.push_pull([],[],[],[])"])
def test_a_call_before_init_says_so(call):
    assert "init() has not been called" in program(f"import fserver_lib as f; {call}", **FULL)


def test_flags_pass_in_host_memory_and_devices_are_refused():
    import fserver_lib as f

    flag, seq = np.zeros(1, np.int64), np.zeros(1, np.int64)
    f.seq_add_one(seq)
    f.write_flag(flag, seq)
    f.wait_flag(flag, seq)
    assert flag[0] == 1
    assert f.map_pinned_tensor(flag, "cpu") is flag
    f.seq_add_one(seq)
    with pytest.raises(errors.Timeout, match="not 2 yet"):
        f.wait_flag(flag, seq, timeout_ms=20)
    with pytest.raises(errors.DeviceUnsupported):
        f.map_pinned_tensor(flag, 0)
    with pytest.raises(errors.InvalidType, match="flag"):
        f.write_flag(np.zeros(1, np.float32), seq)
    assert f.get_nanosecond() < f.get_nanosecond()


def options(**changed) -> stepmesh.Options:
    layout = stepmesh.Layout([stepmesh.PartSpec(64, 4)], [stepmesh.PartSpec(64, 4)], 1)
    return stepmesh.Options(**{"scheduler": "127.0.0.1:1", "layout": layout, "join_timeout": 0.2, **changed})


@pytest.mark.parametrize(
    "changed, error, words",
    [
        ({"transport": "pigeon"}, ValueError, "transport"),
        ({"progress": "magic"}, ValueError, "progress"),
        ({"address": "here"}, ValueError, "address"),
        ({"token": ""}, ValueError, "token"),
        ({"layout": stepmesh.Layout([], [], 0)}, ValueError, "layout"),
        ({"layout": None}, ValueError, "layout"),
        ({"lanes": 9}, ValueError, "lanes"),
        ({"join_timeout": -1.0}, ValueError, "timeout"),
        ({}, errors.SchedulerLost, "127.0.0.1:1"),
    ],
)
def test_options_that_cannot_be_are_refused(changed, error, words):
    with pytest.raises(error, match=words):
        stepmesh.AttentionMesh(options(**changed))


def test_more_memory_than_allowed_is_refused():
    layout = stepmesh.Layout([stepmesh.PartSpec(1 << 20, 1)], [stepmesh.PartSpec(1 << 20, 1)], 3)
    with stepmesh.Scheduler(1, 1) as scheduler, pytest.raises(errors.MemoryLimit, match="limit is 1000"):
        stepmesh.AttentionMesh(options(scheduler=scheduler.url, layout=layout, memory_limit_bytes=1000, join_timeout=5.0))


def test_a_wrong_token_is_refused():
    with stepmesh.Scheduler(1, 1, token="swordfish") as scheduler, pytest.raises(errors.Refused, match="token"):
        stepmesh.FfnMesh(options(scheduler=scheduler.url, token="guess", join_timeout=5.0))
