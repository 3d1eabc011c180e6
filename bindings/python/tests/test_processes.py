"""Peers that die, forks, threads, and the end of the interpreter."""

from __future__ import annotations

import os
import signal
import time

import pytest

QUIET_SERVER = """
f.init()
f.get_batch()
print("has it", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_wait_for_a_killed_server_raises_within_a_second(deploy, transport):
    worker = """
    f.init()
    handler = f.push_pull([tensor(np.ones(4, np.float32))], [1], [tensor(np.ones(4, np.float32))], [2])
    try:
        f.wait(handler, timeout_ms=30_000)
    except errors.PeerLost as error:
        assert "ffn 0" in str(error), error
        print(time.time(), flush=True)
    os._exit(0)
    """
    deployment = deploy(1, 1, transport)
    scheduler = deployment.scheduler()
    server = deployment.start("server", 0, QUIET_SERVER)
    waiting = deployment.start("worker", 0, worker)
    assert server.stdout and server.stdout.readline() == "has it\n"
    time.sleep(0.3)
    killed = time.time()
    server.send_signal(signal.SIGKILL)
    out, err = waiting.communicate(timeout=30)
    assert out, err
    assert float(out) - killed < 1.0
    scheduler.kill()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_server_is_told_of_a_killed_worker_once_and_goes_on_with_the_others(deploy, transport):
    server = """
    f.init()
    try:
        f.get_batch()
    except errors.PeerLost as error:
        assert "attention 1" in str(error), error
        print(time.time(), flush=True)
    while batch := f.get_batch():
        assert len(batch) == 1
        for handler, tensors, _ in batch:
            f.respond(tensors, handler)
    os._exit(0)
    """
    worker = """
    f.init()
    if RANK == 1:
        print("here", flush=True)
        time.sleep(60)
    pull = tensor(np.zeros(4, np.float32))
    for _ in range(3):
        f.wait(f.push_pull([tensor(np.ones(4, np.float32))], [1], [pull], [2]), timeout_ms=30_000)
    assert (array(pull) == 1).all()
    try:
        f.stop()
    except errors.StepmeshError:
        pass  # One will never come to the barrier.
    """
    deployment = deploy(2, 1, transport, STEPMESH_STOP_TIMEOUT=1)
    scheduler = deployment.scheduler()
    serving = deployment.start("server", 0, server)
    other = deployment.start("worker", 0, worker)
    victim = deployment.start("worker", 1, worker)
    assert victim.stdout and victim.stdout.readline() == "here\n"
    time.sleep(0.3)
    killed = time.time()
    victim.send_signal(signal.SIGKILL)
    assert serving.stdout
    assert float(serving.stdout.readline()) - killed < 1.0
    assert other.wait(30) == 0 and serving.wait(30) == 0
    scheduler.kill()


def test_the_interpreter_ends_cleanly_with_requests_under_way(deploy):
    worker = """
    import threading
    f.init()
    pulls = [tensor(np.zeros(4, np.float32)) for _ in range(8)]
    handlers = [f.push_pull([tensor(np.ones(4, np.float32))], [n], [pulls[n]], [100 + n]) for n in range(3)]
    seen = []
    def wait(handler):
        try:
            f.wait(handler, timeout_ms=60_000)
        except errors.StepmeshError as error:
            seen.append(error)
    for handler in handlers:
        threading.Thread(target=wait, args=(handler,), daemon=True).start()
    time.sleep(0.3)
    print("ends", flush=True)
    """
    deployment = deploy(1, 1)
    scheduler = deployment.scheduler()
    server = deployment.start("server", 0, QUIET_SERVER)
    began = time.monotonic()
    ending = deployment.start("worker", 0, worker)
    out, err = ending.communicate(timeout=30)
    assert (ending.returncode, out, err) == (0, "ends\n", "")
    assert time.monotonic() - began < 10
    server.kill()
    scheduler.kill()


def test_a_fork_after_init_is_refused_and_harms_nobody(deploy, run):
    worker = """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    f.init()
    child = os.fork()
    if child == 0:
        words = []
        for call in (lambda: f.wait(1), f.init, f.stop, lambda: f._process.worker.wait(1, 1.0)):
            try:
                call()
            except errors.Forked as error:
                words.append(str(error))
        sys.exit(0 if len(words) == 4 and all("fork" in said for said in words) else 1)
    assert os.waitpid(child, 0)[1] == 0
    pull = tensor(np.zeros(4, np.float32))
    f.wait(f.push_pull([tensor(np.ones(4, np.float32))], [1], [pull], [2]))
    assert (array(pull) == 1).all()
    f.stop()
    """
    server = """
    f.init()
    while batch := f.get_batch():
        for handler, tensors, _ in batch:
            f.respond(tensors, handler)
    f.stop()
    """
    run(deploy(1, 1), worker, server)


CHILDREN = """
import multiprocessing

def take_part(role):
    os.environ["DMLC_ROLE"] = role
    f.init()
    if role == "server":
        (handler, tensors, _), = f.get_batch()
        f.respond(tensors, handler)
    elif role == "worker":
        pull = np.zeros(4, np.float32)
        f.wait(f.push_pull([np.ones(4, np.float32)], [1], [pull], [2]))
        assert (pull == 1).all()
    f.stop()
"""


def test_children_forked_before_init_work(deploy):
    program = CHILDREN + """
fork = multiprocessing.get_context("fork")
children = [fork.Process(target=take_part, args=(role,)) for role in ("scheduler", "server", "worker")]
for child in children: child.start()
for child in children: child.join(60)
assert [child.exitcode for child in children] == [0, 0, 0]
"""
    deployment = deploy(1, 1)
    deployment.start("scheduler", 0, program)
    deployment.finish()


def test_children_spawned_work(deploy, tmp_path):
    (tmp_path / "children.py").write_text("import os\nimport numpy as np\nimport fserver_lib as f\n" + CHILDREN)
    program = f"""
sys.path.insert(0, {str(tmp_path)!r})
from children import take_part
import multiprocessing
if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=take_part, args=(role,)) for role in ("scheduler", "server", "worker")]
    for child in children: child.start()
    for child in children: child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
"""
    deployment = deploy(1, 1)
    deployment.start("scheduler", 0, program)
    deployment.finish()


@pytest.mark.parametrize("progress", ["caller", "thread"])
def test_threads_that_hammer_one_worker_get_right_answers(deploy, run, progress):
    worker = """
    import threading
    f.init()
    failures = []
    def hammer(thread):
        try:
            for round in range(200):
                push = tensor(np.full((3, 5), thread * 1000 + round, np.float32))
                pull = tensor(np.zeros((3, 5), np.float32))
                f.wait(f.push_pull([push], [thread], [pull], [100 + thread]), timeout_ms=30_000)
                assert (array(pull) == array(push)).all()
        except BaseException as error:
            failures.append(error)
    threads = [threading.Thread(target=hammer, args=(n,)) for n in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failures, failures
    f.stop()
    """
    server = """
    import queue, threading
    f.init()
    work = queue.Queue()
    def answer():
        while (item := work.get()) is not None:
            f.respond(*item)
    threads = [threading.Thread(target=answer) for _ in range(2)]
    for thread in threads: thread.start()
    while batch := f.get_batch():
        for handler, tensors, _ in batch:
            # The tensor is its key's until the key's next request, which waits for this answer.
            work.put((tensors, handler))
    for thread in threads: work.put(None)
    for thread in threads: thread.join()
    f.stop()
    """
    run(deploy(1, 1, STEPMESH_PROGRESS=progress), worker, server)


def test_memory_stays_as_it_is_over_many_calls(deploy, run):
    rounds = """
    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    ROUNDS = int(os.environ["ROUNDS"])
    """
    server = rounds + """
    f.init()
    answered, before = 0, 0
    while batch := f.get_batch():
        for handler, tensors, _ in batch:
            f.respond(tensors, handler)
            answered += 1
        if answered == ROUNDS // 4:
            before = resident()
    assert resident() - before < 2 << 20, (before, resident())
    f.stop()
    """
    worker = rounds + """
    f.init()
    push, pull = tensor(np.ones((4, 64), np.float32)), tensor(np.zeros((4, 64), np.float32))
    before = 0
    for round in range(ROUNDS):
        handler = f.push_pull([push], [1], [pull], [2])
        f.wait(handler)
        f.fetch_trace(handler)
        if round == ROUNDS // 4:
            before = resident()
    assert resident() - before < 2 << 20, (before, resident())
    f.stop()
    """
    run(deploy(1, 1, STEPMESH_SPIN_US=50, ROUNDS=os.environ.get("STEPMESH_TEST_CALLS", "100000")), worker, server, 600)
