"""StepMesh's calls as its users know them, between real processes."""

from __future__ import annotations

import os

import pytest

TRANSPORTS = os.environ.get("STEPMESH_TEST_TRANSPORTS", "shm,tcp").split(",")
SHAPES = [(1, 1), (2, 2), (4, 2), (8, 8), (40, 1)]

# Every server answers each request with its tensors, as they are or summed over the workers.
ECHO_SERVER = """
f.init()
for _ in range(int(os.environ["ROUNDS"])):
    batch = f.get_batch()
    assert len(batch) == WORKERS, batch
    for worker, (handler, tensors, keys) in enumerate(batch):
        assert keys == [worker * 65536 + 7], keys
        assert array(tensors[0])[0, 0] == worker, tensors
        f.respond(tensors, handler)
f.stop()
"""
ECHO_WORKER = """
f.init()
push = tensor(np.full((4, 64), RANK, np.float32))
pulls = [tensor(np.zeros((4, 64), np.float32)) for _ in range(SERVERS)]
for round in range(int(os.environ["ROUNDS"])):
    array(push)[1:] = round
    handler = f.push_pull([push], [RANK * 65536 + 7], pulls, [(1 << 24) + server for server in range(SERVERS)])
    f.wait(handler)
    for pull in pulls:
        assert (array(pull) == array(push)).all()
        array(pull)[:] = 0
f.stop()
print("echoed")
"""


@pytest.mark.parametrize("workers, servers", SHAPES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_echo_comes_back_from_every_server(deploy, run, transport, workers, servers):
    many = workers * servers > 16
    deployment = deploy(workers, servers, transport, ROUNDS=5 if many else 50, STEPMESH_SLOT_BYTES=65536, STEPMESH_SLOTS=1)
    printed = run(deployment, ECHO_WORKER, ECHO_SERVER, timeout=240)
    assert sum("echoed" in out for out in printed.values()) == workers


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_sum_over_the_workers_goes_to_each_of_them(deploy, run, transport):
    server = """
    f.init()
    own = int(os.environ["DMLC_NODE_RANK"]) + 1
    for _ in range(20):
        batch = f.get_batch()
        total = sum(array(tensors[0]) for _, tensors, _ in batch) * own
        for handler, _, _ in batch:
            f.respond([tensor(total)], handler)
    f.stop()
    """
    worker = """
    f.init()
    for round in range(20):
        pulls = [tensor(np.zeros((3, 16), np.float32)) for _ in range(SERVERS)]
        push = tensor(np.full((3, 16), 10.0 ** RANK * (round + 1), np.float32))
        f.wait(f.push_pull([push], [1], pulls, range(100, 100 + SERVERS)))
        for server, pull in enumerate(pulls):
            assert (array(pull) == 11 * (round + 1) * (server + 1)).all(), (server, pull)
    f.stop()
    """
    run(deploy(2, 2, transport), worker, server)


def test_several_tensors_of_several_kinds_in_several_microbatches(deploy, run):
    server = """
    f.init()
    order = []
    for _ in range(30):
        for handler, tensors, keys in f.get_batch():
            order.append(keys[0])
            f.respond([tensors[2], tensors[0]], handler)
    assert order == [3 * (n % 3) for n in range(30)], order
    f.stop()
    """
    worker = """
    f.init()
    for round in range(10):
        under_way = []
        for microbatch in range(3):
            pushes = [
                tensor(np.full((5, 7), round + microbatch, np.float32)),
                tensor(np.arange(6, dtype=np.int64).reshape(2, 3) + round),
                tensor(np.full((1, 2, 3), round, np.uint8)),
            ]
            pulls = [tensor(np.zeros((1, 2, 3), np.uint8)), tensor(np.zeros((5, 7), np.float32))]
            keys = range(3 * microbatch, 3 * microbatch + 3)
            under_way.append((f.push_pull(pushes, keys, pulls, [1000 + key for key in keys][:2]), pushes, pulls))
        for handler, pushes, pulls in reversed(under_way):
            f.wait(handler, timeout_ms=50_000)
            assert (array(pulls[0]) == array(pushes[2])).all() and (array(pulls[1]) == array(pushes[0])).all()
            handlers = f.get_all_handlers(handler)
            assert handlers[0] == handler and len(set(handlers)) == 6
            trace = f.fetch_trace(handlers[-1])
            assert len(trace) == 8 and all(trace) and trace == sorted(trace), trace
            assert trace.copied_bytes > 0
    f.stop()
    """
    run(deploy(1, 1), worker, server)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_requests_than_slots_may_be_under_way(deploy, run, transport):
    server = """
    f.init()
    for _ in range(100):
        for handler, tensors, _ in f.get_batch():
            f.respond(tensors, handler)
    f.stop()
    """
    worker = """
    f.init()
    pulls = [tensor(np.zeros(8, np.float32)) for _ in range(100)]
    handlers = [
        f.push_pull([tensor(np.full(8, n, np.float32))], [n], [pulls[n]], [1000 + n]) for n in range(100)
    ]
    for n in reversed(range(100)):
        f.wait(handlers[n])
        assert (array(pulls[n]) == n).all()
    f.stop()
    """
    run(deploy(1, 1, transport, STEPMESH_SLOTS=2), worker, server)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_registered_buffers_receive_each_worker_in_its_share(deploy, run, transport):
    server = """
    f.init()
    buffer = tensor(np.zeros((4, 8), np.float32))
    f.register_recv_buffer(buffer, [0, 1], [5, 6])
    for round in range(10):
        batch = f.get_batch()
        assert (array(buffer)[:2] == round).all() and (array(buffer)[2:] == 100 + round).all(), buffer
        results = tensor(array(buffer) * 2)
        parts = [tensors[0] for _, tensors, _ in batch]
        assert all(part.shape[0] == 2 for part in parts)
        f.respond_vec(tensor(np.full((2, 8), round, np.float32)), parts, [handler for handler, _, _ in batch])
    f.stop()
    """
    worker = """
    f.init()
    pull = tensor(np.zeros((2, 8), np.float32))
    for round in range(10):
        f.wait(f.push_pull([tensor(np.full((2, 8), 100 * RANK + round, np.float32))], [5 + RANK], [pull], [50]))
        assert (array(pull) == round).all()
    f.stop()
    """
    run(deploy(2, 1, transport), worker, server)


def test_tensors_in_slots_are_not_copied(deploy, run):
    server = """
    f.init()
    for round in range(10):
        for handler, tensors, _ in f.get_batch():
            out, = f.reply_buffers(handler)
            array(out)[:] = array(tensors[0]) + 1
            f.respond([out], handler)
    f.stop()
    """
    worker = """
    f.init()
    pull = tensor(np.zeros((2, 8), np.float32))
    for round in range(10):
        push, = f.push_buffers([((2, 8), "float32")])
        array(push)[:] = round
        handler = f.push_pull([push], [1], [pull], [2])
        f.wait(handler)
        assert (array(pull) == round + 1).all()
        # Only into the pull tensor.
        assert f.fetch_trace(handler).copied_bytes == 64, f.fetch_trace(handler).copied_bytes
    f.stop()
    """
    run(deploy(1, 1, STEPMESH_IN_PLACE=1), worker, server)


def test_barriers_hold_until_all_of_the_groups_have_come(deploy, run):
    server = """
    f.init()
    f.barrier(True, False)
    time.sleep(0.3 * int(os.environ["DMLC_NODE_RANK"]))
    began = time.time()
    f.barrier(True, True)
    print(began)
    f.stop()
    """
    worker = """
    f.init()
    f.barrier(False, True)
    f.barrier(include_server=True, include_client=True)
    print(time.time())
    f.stop()
    """
    printed = run(deploy(2, 2), worker, server)
    last = max(float(out) for name, out in printed.items() if "server" in name)
    assert all(float(out) >= last for name, out in printed.items() if "worker" in name)


def test_the_processes_of_one_index_form_a_mesh_of_their_own(deploy):
    server = """
    f.init()
    for handler, tensors, keys in f.get_batch():
        assert keys == [int(os.environ["STEPMESH_GPU"])]
        f.respond(tensors, handler)
    f.stop()
    """
    worker = """
    f.init()
    pull = tensor(np.zeros(4, np.int32))
    f.wait(f.push_pull([tensor(np.full(4, 9, np.int32))], [int(os.environ["STEPMESH_GPU"])], [pull], [1]))
    assert (array(pull) == 9).all()
    f.stop()
    """
    deployment = deploy(1, 1, DMLC_GROUP_SIZE=2)
    deployment.scheduler()
    for gpu in range(2):
        deployment.start("server", 0, server, STEPMESH_GPU=gpu)
        deployment.start("worker", 0, worker, STEPMESH_GPU=gpu)
    deployment.finish()


def test_get_batch_is_empty_when_all_workers_have_stopped(deploy, run):
    server = """
    f.init()
    answered = 0
    while batch := f.get_batch():
        for handler, tensors, _ in batch:
            f.respond(tensors, handler)
            answered += 1
    assert answered == 6, answered
    assert f.get_batch() == []
    f.stop()
    """
    worker = """
    f.init()
    pull = tensor(np.zeros(4, np.int32))
    for _ in range(3):
        f.wait(f.push_pull([tensor(np.full(4, 9, np.int32))], [RANK], [pull], [1]))
    f.stop()
    """
    run(deploy(2, 1), worker, server)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_random_shapes_and_types_arrive_as_they_were_sent(deploy, run, transport):
    server = """
    f.init()
    while batch := f.get_batch():
        for handler, tensors, keys in batch:
            checksums = [zlib.crc32(array(t).tobytes()) for t in tensors]
            f.respond([tensor(np.array(checksums, np.int64).reshape(-1)), *tensors], handler)
    f.stop()
    """
    worker = """
    f.init()
    random.seed(RANK)
    types = [np.float32, np.float64, np.float16, np.uint8, np.int8, np.int16, np.int32, np.int64, np.bool_]
    noise = np.random.default_rng(RANK).integers(0, 2, 1 << 18, dtype=np.uint8)
    key = 0
    for round in range(int(os.environ["ROUNDS"])):
        pushes, keys = [], []
        for _ in range(random.randint(1, 4)):
            dtype = np.dtype(random.choice(types))
            shape = [random.choice([0, 1, 2, 3, 17, 64]) for _ in range(random.randint(1, 2))]
            size = int(np.prod(shape)) * dtype.itemsize
            start = random.randrange(len(noise) - size) // 8 * 8 if size else 0
            pushes.append(tensor(noise[start : start + size].view(dtype).reshape(shape).copy()))
            keys.append(key)
            key += 1
        pulls = [tensor(np.zeros(len(pushes), np.int64)), *(tensor(np.zeros_like(array(p))) for p in pushes)]
        f.wait(f.push_pull(pushes, keys, pulls, [(1 << 40) + key * 8 + n for n in range(len(pulls))]))
        for checksum, push, pull in zip(array(pulls[0]), pushes, pulls[1:]):
            assert array(push).tobytes() == array(pull).tobytes()
            assert zlib.crc32(array(push).tobytes()) == checksum
    f.stop()
    """
    rounds = int(os.environ.get("STEPMESH_TEST_ROUNDS", "10000"))
    run(deploy(1, 1, transport, ROUNDS=rounds, STEPMESH_SPIN_US=20), worker, server)
