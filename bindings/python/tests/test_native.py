"""The native API: both sides in one process, a thread each."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time

import numpy as np
import pytest

import stepmesh
from stepmesh import errors

LAYOUT = stepmesh.Layout(
    request=[stepmesh.PartSpec(64, 8), stepmesh.PartSpec(8, 8)], reply=[stepmesh.PartSpec(128, 8)], microbatches=3
)


class Pair:
    """One attention and one FFN instance."""

    def __init__(self, transport: str, progress: str) -> None:
        self.scheduler = stepmesh.Scheduler(1, 1)
        joined: dict[str, object] = {}

        def options(name: str) -> stepmesh.Options:
            return stepmesh.Options(self.scheduler.url, LAYOUT, transport=transport, progress=progress, name=name)

        def join_ffn() -> None:
            joined["ffn"] = stepmesh.FfnMesh(options("ffn"))

        thread = threading.Thread(target=join_ffn)
        thread.start()
        self.attention = stepmesh.AttentionMesh(options("attention"))
        thread.join()
        self.ffn: stepmesh.FfnMesh = joined["ffn"]  # type: ignore[assignment]
        waiting = threading.Thread(target=self.ffn.wait_complete)
        waiting.start()
        self.attention.wait_complete()
        waiting.join()
        self.serving: threading.Thread | None = None
        self.failures: list[BaseException] = []

    def serve(self, batches: int, policy: object = "all") -> None:
        """Answers with each row twice, beside itself, on a thread."""

        def run() -> None:
            try:
                for _ in range(batches):
                    batch = self.ffn.next_batch(policy, timeout=20)
                    assert batch is not None
                    for segment in batch:
                        x = stepmesh.numpy(segment.tensor())
                        segment.set_reply([segment.put(0, np.concatenate([x, x], axis=1))])
                    self.ffn.respond(batch)
            except BaseException as error:
                self.failures.append(error)

        self.serving = threading.Thread(target=run)
        self.serving.start()

    def close(self) -> None:
        if self.serving is not None:
            self.serving.join(30)
        self.attention.close()
        self.ffn.close()
        self.scheduler.close()
        assert not self.failures, self.failures


@contextlib.contextmanager
def two_and_one(transport: str, progress: str):
    """An FFN instance and two attention instances, by rank, all there."""
    spec = [stepmesh.PartSpec(8, 1)]
    with stepmesh.Scheduler(attention=2, ffn=1) as scheduler:
        options = stepmesh.Options(
            scheduler.url, stepmesh.Layout(spec, spec, microbatches=1), transport=transport, progress=progress
        )
        meshes: list[stepmesh.AttentionMesh] = [None, None]  # type: ignore[list-item]

        def join(rank: int) -> None:
            meshes[rank] = stepmesh.AttentionMesh(options)
            meshes[rank].wait_complete()

        joining = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
        for thread in joining:
            thread.start()
        with stepmesh.FfnMesh(options) as ffn:
            ffn.wait_complete()
            for thread in joining:
                thread.join()
            yield ffn, meshes
            for mesh in meshes:
                mesh.close()


@pytest.mark.parametrize("progress", ["caller", "thread"])
def test_a_batch_is_released_by_the_policy_of_its_own_call(progress):
    with two_and_one("tcp", progress) as (ffn, meshes):

        def push(rank: int, group: int) -> stepmesh.Ticket:
            return meshes[rank].push_pull(meshes[rank].acquire(0, timeout=5), [], group=group)

        for step in range(40):
            # Whoever is there, one by one, and then nobody without the other.
            tickets = [push(rank, 2 * step) for rank in range(2)]
            answered = 0
            while answered < 2:
                for mesh in meshes:
                    mesh.poll()
                if (batch := ffn.next_batch("any", timeout=0.01)) is not None:
                    answered += len(batch)
                    ffn.respond(batch)
            for _ in range(20):
                ffn.poll()
            for mesh, ticket in zip(meshes, tickets):
                while not mesh.test(ticket):
                    ffn.poll()
                mesh.wait(ticket)
            first = push(0, 2 * step + 1)
            for _ in range(20):
                meshes[0].poll()
                assert ffn.next_batch("all", timeout=0.0) is None, step
            second = push(1, 2 * step + 1)
            while (batch := ffn.next_batch("all", timeout=0.01)) is None:
                meshes[1].poll()
            assert len(batch) == 2, step
            ffn.respond(batch)
            for mesh, ticket in zip(meshes, (first, second)):
                while not mesh.test(ticket):
                    ffn.poll()
                mesh.wait(ticket)


@pytest.mark.parametrize("progress", ["caller", "thread"])
def test_a_batch_is_released_when_its_deadline_has_passed(progress):
    with two_and_one("shm", progress) as (ffn, meshes):

        def push(mesh: stepmesh.AttentionMesh, group: int) -> stepmesh.Ticket:
            return mesh.push_pull(mesh.acquire(0, timeout=5), [], group=group)

        # Once both take part, either is waited for.
        tickets = [(mesh, push(mesh, 0)) for mesh in meshes]
        ffn.respond(ffn.next_batch(("at_least", 2), timeout=20))
        for mesh, ticket in tickets:
            mesh.wait(ticket)
        took = []
        for group in range(1, 30):
            ticket = push(meshes[0], group)
            began = time.monotonic()
            ffn.respond(ffn.next_batch(("deadline", 0.005), timeout=20))
            took.append(time.monotonic() - began)
            meshes[0].wait(ticket)
        # Whoever waits looks around now and then in any case.
        assert min(took) < 0.015, took


@pytest.fixture(params=[("shm", "caller"), ("shm", "thread"), ("tcp", "caller"), ("tcp", "thread")], ids="-".join)
def pair(request):
    pair = Pair(*request.param)
    yield pair
    pair.close()


@pytest.fixture
def shm():
    pair = Pair("shm", "caller")
    yield pair
    pair.close()


def push(mesh: stepmesh.AttentionMesh, microbatch: int, value: float, rows: int = 4, **more) -> stepmesh.Ticket:
    buffer = mesh.acquire(microbatch, timeout=10)
    stepmesh.numpy(buffer.tensor(0, (rows, 16), "float32"))[:] = value
    return mesh.push_pull(buffer, [stepmesh.Part(rows, 64, "float32")], **more)


def test_rows_are_made_read_and_answered_in_place(pair):
    pair.serve(30)
    for layer in range(10):
        tickets = [push(pair.attention, m, layer + m / 4, rows=m * 4, group=layer) for m in range(3)]
        for microbatch, ticket in enumerate(tickets):
            assert ticket.microbatch == microbatch
            reply = pair.attention.wait(ticket)
            got = stepmesh.numpy(reply.tensor())
            assert got.shape == (microbatch * 4, 32) and (got == layer + microbatch / 4).all()
            trace = reply.trace()
            assert trace["round_trip_ns"] > 0 and trace["same_clock"]


def test_what_is_sent_besides_tensors_arrives(shm):
    buffer = shm.attention.acquire(1)
    parts = [buffer.put(0, np.ones((2, 4), np.int16), key=1 << 63), buffer.put(1, np.arange(3, dtype=np.uint8), key=5)]
    ticket = shm.attention.push_pull(buffer, parts, group=7, app=b"layer 7")
    batch = shm.ffn.next_batch(timeout=5)
    assert (batch.microbatch, batch.group, len(batch)) == (1, 7, 1)
    segment = batch[-1]
    assert (segment.rank, segment.rows, segment.app) == (0, 2, b"layer 7".ljust(16, b"\0"))
    assert segment.parts == parts and segment.parts[0].key == 1 << 63
    assert segment.tensor(0).dtype == "int16" and stepmesh.numpy(segment.tensor(1)).tolist() == [[0], [1], [2]]
    segment.fail("no experts")
    shm.ffn.respond(batch)
    with pytest.raises(errors.PeerFailed, match="no experts"):
        shm.attention.wait(ticket)


def test_a_slot_is_one_memory_to_numpy_dlpack_and_buffers(shm):
    buffer = shm.attention.acquire(0)
    tensor = buffer.tensor(0, (8, 16), "float32")
    array, shared, memory = stepmesh.numpy(tensor), np.from_dlpack(tensor), stepmesh.memory(tensor)
    array[1, 2] = 42
    assert shared[1, 2] == 42 and memory[(16 + 2) * 4 : (16 + 3) * 4] == np.float32(42).tobytes()
    assert array.ctypes.data == shared.ctypes.data == tensor.data_ptr
    bits = tensor.view((8, 32), "bfloat16")
    assert stepmesh.numpy(bits).itemsize == 2 and bits.nbytes == tensor.nbytes
    capsule = tensor.__dlpack__()
    del capsule, array, shared, memory
    gc.collect()
    buffer.release()


def test_a_request_is_read_only_where_it_is_the_senders_memory(shm):
    ticket = push(shm.attention, 0, 3)
    batch = shm.ffn.next_batch(timeout=5)
    tensor = batch[0].tensor()
    assert tensor.readonly and not stepmesh.numpy(tensor).flags.writeable and stepmesh.memory(tensor).readonly
    with pytest.raises(ValueError, match="read-only"):
        np.from_dlpack(tensor)[0, 0] = 1
    batch[0].set_reply([])
    shm.ffn.respond(batch)
    shm.attention.wait(ticket)


def test_tensors_outlive_the_mesh_that_they_came_from(pair):
    pair.serve(1)
    reply = pair.attention.wait(push(pair.attention, 0, 5))
    array = stepmesh.numpy(reply.tensor())
    pair.close()
    del reply
    gc.collect()
    assert (array == 5).all()


def test_a_coroutine_waits_while_others_go_on(shm):
    async def run() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        ticking = asyncio.create_task(tick())
        tickets = [push(shm.attention, microbatch, microbatch) for microbatch in range(3)]
        waits = [asyncio.create_task(shm.attention.wait_async(ticket)) for ticket in tickets]
        await asyncio.sleep(0.1)
        shm.serve(3)
        for microbatch, reply in enumerate(await asyncio.gather(*waits)):
            assert (stepmesh.numpy(reply.tensor()) == microbatch).all()
        ticking.cancel()
        assert ticks > 3

    asyncio.run(run())


def test_an_ffn_instance_serves_from_a_coroutine(shm):
    async def serve() -> None:
        batch = await shm.ffn.next_batch_async(timeout=20)
        batch[0].set_reply([])
        shm.ffn.respond(batch)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert shm.attention.wait(push(shm.attention, 0, 1)).parts() == []
    thread.join()


def test_policies_are_understood_and_others_refused(shm):
    for policy in ("any", "all", ("at_least", 1), ("deadline", 0.001)):
        shm.serve(1, policy)
        shm.attention.wait(push(shm.attention, 0, 1))
        shm.serving.join()
    for wrong in ("most", ("at_least", "x"), ("perhaps", 1), 7):
        with pytest.raises(errors.InvalidArgument, match="policy"):
            shm.ffn.next_batch(wrong)
    assert shm.ffn.next_batch(timeout=0.01) is None


def test_events_tell_who_comes_and_goes(pair):
    def events(mesh) -> list[dict]:
        seen = []
        while (event := mesh.next_event(timeout=0.2)) is not None:
            seen.append(event)
        return seen

    assert {"joined", "link_up", "epoch"} <= {event["kind"] for event in events(pair.attention)}
    pair.ffn.close()
    lost = [event for event in events(pair.attention) if event["kind"] == "peer_lost"]
    assert lost and (lost[0]["role"], lost[0]["rank"], lost[0]["name"]) == ("ffn", 0, "ffn") and lost[0]["reason"]
    with pytest.raises(errors.NotLinked):
        pair.attention.acquire(0)


def test_a_ticket_can_be_given_up(shm):
    ticket = push(shm.attention, 0, 1)
    with pytest.raises(TimeoutError):
        shm.attention.wait(ticket, timeout=0.01)
    assert not shm.attention.test(ticket)
    shm.attention.cancel(ticket)
    with pytest.raises(errors.UnknownTicket):
        shm.attention.wait(ticket)


def test_a_batch_that_is_dropped_fails_its_requests(shm):
    ticket = push(shm.attention, 0, 1)
    assert shm.ffn.next_batch(timeout=5) is not None
    gc.collect()
    with pytest.raises(errors.PeerFailed, match="dropped"):
        shm.attention.wait(ticket)


def test_wrong_uses_are_refused_by_name_and_harm_nothing(shm):
    buffer = shm.attention.acquire(0)
    part = stepmesh.Part(1, 64)
    with pytest.raises(errors.WouldBlock):
        shm.attention.acquire(0)
    with pytest.raises(errors.InvalidArgument, match="microbatch 9"):
        shm.attention.acquire(9)
    with pytest.raises(errors.InvalidArgument, match="no part 5"):
        buffer.tensor(5)
    with pytest.raises(errors.InvalidArgument, match="shape"):
        buffer.tensor(0, (100, 100), "float32")
    with pytest.raises(errors.InvalidArgument, match="dtype: .*complex64"):
        buffer.tensor(0, (1,), np.complex64)
    with pytest.raises(errors.InvalidArgument, match="do not fit part 1"):
        buffer.put(1, np.zeros(1000, np.uint8))
    with pytest.raises(errors.InvalidArgument, match="not contiguous"):
        buffer.put(0, np.zeros((4, 4), np.float32).T[1:])
    with pytest.raises(errors.InvalidArgument, match="parts: more than 8"):
        shm.attention.push_pull(buffer, [part] * 9)
    with pytest.raises(errors.InvalidType, match=r"parts\[1\]"):
        shm.attention.push_pull(buffer, [part, "x"])
    with pytest.raises(errors.InvalidArgument, match="app: 17 bytes"):
        shm.attention.push_pull(buffer, [part], app=b"x" * 17)
    buffer.release()
    with pytest.raises(errors.InvalidArgument, match="pushed or released"):
        buffer.tensor()
    with pytest.raises(errors.InvalidArgument, match="pushed or released"):
        shm.attention.push_pull(buffer, [part])
    too_large = shm.attention.acquire(0)
    with pytest.raises(errors.InvalidArgument, match="does not fit"):
        shm.attention.push_pull(too_large, [stepmesh.Part(9, 64)])
    shm.serve(1)
    ticket = push(shm.attention, 0, 2)
    with pytest.raises(errors.WouldBlock):
        shm.attention.acquire(0)
    reply = shm.attention.wait(ticket)
    with pytest.raises(errors.InvalidArgument, match="rank: 1 of 1"):
        reply.tensor(1)
    with pytest.raises(errors.InvalidArgument, match="no part 3"):
        reply.tensor(0, 3)
    with pytest.raises(errors.UnknownTicket):
        shm.attention.wait(ticket)


def test_a_ticket_and_a_batch_of_another_mesh_are_refused(shm):
    other = Pair("shm", "caller")
    try:
        ticket = push(other.attention, 0, 1)
        batch = other.ffn.next_batch(timeout=5)
        push(shm.attention, 0, 1)
        with pytest.raises(errors.UnknownTicket, match="another mesh"):
            shm.attention.wait(ticket)
        with pytest.raises(errors.UnknownTicket, match="another mesh"):
            shm.ffn.respond(batch)
        other.ffn.respond(batch)
        with pytest.raises(errors.InvalidArgument, match="answered"):
            other.ffn.respond(batch)
        with pytest.raises(errors.InvalidArgument, match="answered"):
            batch[0].tensor()
    finally:
        other.close()


def test_a_closed_mesh_says_so_and_ends_waits(shm):
    ticket = push(shm.attention, 0, 1)
    seen: list[BaseException] = []

    def wait() -> None:
        try:
            shm.attention.wait(ticket, timeout=30)
        except errors.StepmeshError as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    threading.Event().wait(0.1)
    shm.attention.close()
    thread.join(10)
    assert not thread.is_alive() and isinstance(seen[0], errors.Closed)
    with pytest.raises(errors.Closed):
        shm.attention.acquire(0)
    shm.attention.close()


def test_barriers_hold_both_sides(pair):
    order: list[str] = []

    def ffn() -> None:
        pair.ffn.barrier("here")
        order.append("ffn")
        pair.ffn.barrier("there")

    thread = threading.Thread(target=ffn)
    thread.start()
    threading.Event().wait(0.1)
    assert order == []
    pair.attention.barrier("here")
    pair.attention.barrier("there")
    thread.join()
    pair.attention.barrier(group="attention")
    with pytest.raises(TimeoutError):
        pair.attention.barrier("alone", timeout=0.05)
    with pytest.raises(errors.InvalidArgument, match="group"):
        pair.attention.barrier(group="everyone")


def test_threads_share_one_mesh(pair):
    pair.serve(60)
    failures: list[BaseException] = []

    def use(microbatch: int) -> None:
        try:
            for round_ in range(20):
                ticket = push(pair.attention, microbatch, microbatch * 100 + round_, group=round_)
                got = stepmesh.numpy(pair.attention.wait(ticket, timeout=30).tensor())
                assert (got == microbatch * 100 + round_).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(microbatch,)) for microbatch in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_ml_dtypes_cross_by_their_own_name(shm):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    buffer = shm.attention.acquire(0)
    part = buffer.put(0, np.full((2, 4), 1.5, ml_dtypes.bfloat16))
    assert part.dtype == "bfloat16" and part.row_bytes == 8
    assert (stepmesh.numpy(buffer.tensor(0, (2, 4), "bfloat16")) == 1.5).all()
    buffer.release()


def test_torch_sees_the_same_memory(shm):
    torch = pytest.importorskip("torch")
    buffer = shm.attention.acquire(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool):
        tensor = stepmesh.torch(buffer.tensor(0, (2, 4), dtype))
        assert tensor.dtype == dtype and tensor.shape == (2, 4)
        part = buffer.put(0, torch.ones((2, 4), dtype=dtype))
        assert part.dtype == str(dtype).removeprefix("torch.")
        assert (tensor.float() == 1).all()
    with pytest.raises(errors.InvalidArgument, match="not contiguous"):
        buffer.put(0, torch.ones(4, 2).T)
    with pytest.raises(errors.DeviceUnsupported, match="meta"):
        buffer.put(0, torch.ones((2, 4), device="meta"))
    buffer.release()


def test_jax_sees_the_same_memory(shm):
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    shm.serve(1)
    buffer = shm.attention.acquire(0)
    rows = jnp.arange(32, dtype=jnp.float32).reshape(2, 16)
    got = shm.attention.wait(shm.attention.push_pull(buffer, [buffer.put(0, rows)]))
    reply = got.tensor()
    seen = jax.dlpack.from_dlpack(reply)
    assert seen.unsafe_buffer_pointer() == reply.data_ptr and seen.shape == (2, 32)
    assert (seen == jnp.concatenate([rows, rows], axis=1)).all()
