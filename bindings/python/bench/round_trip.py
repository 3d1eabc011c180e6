"""The whole cycle of one layer in Python, over shared memory, two processes that spin, each on a CPU of its own: stepmesh's
native API in place, fserver_lib with tensors of the program's, and NIXL's Python API, in turn in the same run.

    python round_trip.py [--rounds N] [--turns N] [--cpus A,B] [--json FILE] [--python nixl=/other/venv/bin/python]

Nobody reads or makes the payload while the clock runs; that it arrives is checked once before. A figure is the median of a
turn's cycles; of several turns the smallest counts, and the range is beside it. What is not installed is left out.

Where there is a C compiler, fserver_lib's four copies are taken alone, too (copies.c), through one slot each way, plainly and past
the caches; and what the quicker of them and the native cycle come to together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = {"7168 -> 14336 B": (7168, 14336), "896 KiB -> 1.75 MiB": (917504, 1835008)}
WARM_UP = 500


def percentile(values: list[int], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] / 1e3


def report(times: list[int]) -> None:
    """One line for the parent: microseconds."""
    times = times[WARM_UP:]
    print(json.dumps({"p50": statistics.median(times) / 1e3, "p99": percentile(times, 0.99)}), flush=True)


@contextlib.contextmanager
def pinned():
    """This thread alone on its CPU, before all others if `--realtime` says so; those of the libraries stay as they are."""
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(os.environ["ROUND_TRIP_CPU"])})
    if priority := os.environ.get("ROUND_TRIP_REALTIME"):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(int(priority)))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, everywhere)


def timed(rounds: int, cycle) -> None:
    clock, times = time.perf_counter_ns, []
    with pinned():
        for round_ in range(rounds + WARM_UP):
            began = clock()
            cycle(round_)
            times.append(clock() - began)
    report(times)


# ---- stepmesh, native ----


def native(side: str, sizes: tuple[int, int], rounds: int, url: str) -> None:
    import stepmesh

    push, pull = sizes
    layout = stepmesh.Layout([stepmesh.PartSpec(push, 1)], [stepmesh.PartSpec(pull, 1)], 1)
    options = stepmesh.Options(url, layout, spin_us=1_000_000)
    request, reply = (stepmesh.Part(1, push, "uint8"),), (stepmesh.Part(1, pull, "uint8"),)
    if side == "ffn":
        with stepmesh.FfnMesh(options) as mesh:
            mesh.wait_complete()
            batch = mesh.next_batch(timeout=30)
            first = stepmesh.memory(batch[0].tensor())[:8].tobytes()
            stepmesh.memory(batch[0].reply())[:8] = first
            batch[0].set_reply(reply)
            mesh.respond(batch)
            with pinned():
                for _ in range(rounds + WARM_UP):
                    batch = mesh.next_batch(timeout=30)
                    batch[0].set_reply(reply)
                    mesh.respond(batch)
            mesh.barrier("end")
        return
    with stepmesh.AttentionMesh(options) as mesh:
        mesh.wait_complete()
        buffer = mesh.acquire(0)
        stepmesh.memory(buffer.tensor())[:8] = b"stepmesh"
        got = mesh.wait(mesh.push_pull(buffer, request))
        assert stepmesh.memory(got.tensor())[:8].tobytes() == b"stepmesh"

        def cycle(round_: int) -> None:
            mesh.wait(mesh.push_pull(mesh.acquire(0), request, round_ + 1))

        timed(rounds, cycle)
        mesh.barrier("end")


# ---- fserver_lib ----


def fserver(side: str, sizes: tuple[int, int], rounds: int, url: str, tensors: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    os.environ.update(
        DMLC_ROLE="server" if side == "ffn" else "worker",
        DMLC_PS_ROOT_URI=host,
        DMLC_PS_ROOT_PORT=port,
        DMLC_NUM_WORKER="1",
        DMLC_NUM_SERVER="1",
        STEPMESH_TENSORS=tensors,
        STEPMESH_SPIN_US="1000000",
        STEPMESH_SLOT_BYTES=str(2 << 20),
    )
    if tensors == "torch":
        import torch

        def make(size: int, value: int):
            return torch.full((size,), value, dtype=torch.uint8)
    else:
        import numpy

        def make(size: int, value: int):
            return numpy.full(size, value, numpy.uint8)

    import fserver_lib as f

    push, pull = sizes
    f.init()
    if side == "ffn":
        out = make(pull, 7)
        with pinned():
            for _ in range(rounds + WARM_UP + 1):
                for handler, _tensors, _keys in f.get_batch():
                    f.respond([out], handler)
        f.stop()
        return
    pushes, pulls, push_keys, pull_keys = [make(push, 1)], [make(pull, 0)], [1], [2]

    def cycle(_round: int) -> None:
        f.wait(f.push_pull(pushes, push_keys, pulls, pull_keys, False))

    cycle(0)
    assert int(pulls[0][-1]) == 7
    timed(rounds, cycle)
    f.stop()


# ---- NIXL ----


def nixl(side: str, sizes: tuple[int, int], rounds: int, folder: str) -> None:
    import numpy
    from nixl._api import nixl_agent, nixl_agent_config

    other = "attention" if side == "ffn" else "ffn"
    push, pull = sizes
    agent = nixl_agent(side, nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
    # What this side sends, and where the other side's lands.
    own, landing = (push, pull) if side == "attention" else (pull, push)
    sent, landed = numpy.zeros(own, numpy.uint8), numpy.zeros(landing, numpy.uint8)
    sent[:8] = list(b"stepmesh")
    registered = [(array.ctypes.data, array.nbytes, 0, "") for array in (sent, landed)]
    agent.register_memory(agent.get_reg_descs(registered, "DRAM"))
    landing_descs = agent.get_xfer_descs([(landed.ctypes.data, landed.nbytes, 0)], "DRAM")
    said = {"agent": agent.get_agent_metadata(), "landing": agent.get_serialized_descs(landing_descs)}
    for name, data in said.items():
        path = os.path.join(folder, f"{side}.{name}")
        with open(path + ".part", "wb") as file:
            file.write(data)
        os.rename(path + ".part", path)
    heard = {}
    deadline = time.monotonic() + 30
    for name in said:
        path = os.path.join(folder, f"{other}.{name}")
        while not os.path.exists(path):
            if time.monotonic() > deadline:
                raise TimeoutError(path)
            time.sleep(0.01)
        with open(path, "rb") as file:
            heard[name] = file.read()
    peer = agent.add_remote_agent(heard["agent"])
    remote = agent.deserialize_descs(heard["landing"])
    local = agent.get_xfer_descs([(sent.ctypes.data, sent.nbytes, 0)], "DRAM")
    transfer = agent.initialize_xfer("WRITE", local, remote, peer, b"x")

    def send() -> None:
        if agent.transfer(transfer) == "DONE":
            return
        while (state := agent.check_xfer_state(transfer)) != "DONE":
            if state == "ERR":
                raise RuntimeError("the transfer failed")

    def receive() -> None:
        until = time.monotonic() + 30
        while not agent.get_new_notifs():
            if time.monotonic() > until:
                raise TimeoutError("no notification")

    if side == "ffn":
        with pinned():
            for _ in range(rounds + WARM_UP + 1):
                receive()
                send()
        # The other side still has to take the last one.
        time.sleep(0.5)
        os._exit(0)

    def cycle(_round: int) -> None:
        send()
        receive()

    cycle(0)
    assert landed[:8].tobytes() == b"stepmesh"
    timed(rounds, cycle)
    # Its libraries do not always survive the interpreter's end.
    os._exit(0)


# ---- the parent ----


def turn(system: str, sizes: str, rounds: int, cpus: list[int], python: str) -> dict[str, float]:
    """One measurement: both sides as processes."""
    with tempfile.TemporaryDirectory() as folder:
        where, scheduler = folder, None
        if system != "nixl":
            import stepmesh

            scheduler = stepmesh.Scheduler(1, 1)
            where = scheduler.url
        sides = {}
        for side, cpu in zip(("ffn", "attention"), cpus):
            command = [python, os.path.abspath(__file__), "--side", side, "--system", system]
            command += ["--sizes", sizes, "--rounds", str(rounds), "--where", where]
            sides[side] = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "ROUND_TRIP_CPU": str(cpu)},
            )
        try:
            out, err = sides["attention"].communicate(timeout=60)
            _, ffn_err = sides["ffn"].communicate(timeout=30)
        finally:
            for process in sides.values():
                if process.poll() is None:
                    process.kill()
                    process.communicate()
            if scheduler is not None:
                scheduler.close()
    if sides["attention"].returncode != 0:
        raise RuntimeError(f"{system}: {err or ffn_err}")
    return json.loads(out.strip().splitlines()[-1])


COPIES, PAST, SIGNALS = "four copies, C", "past the caches, C", "two signals, C"


def compiled(folder: str) -> str | None:
    """The program of copies.c, if there is a compiler."""
    source, program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "copies.c"), os.path.join(folder, "copies")
    compiler = shutil.which("cc")
    command = [compiler or "", "-O3", "-march=native", "-pthread", source, "-o", program]
    return program if compiler and subprocess.run(command).returncode == 0 else None


def copies(
    program: str, sizes: tuple[int, int], rounds: int, cpus: list[int], priority: str | None, past: bool
) -> dict[str, float]:
    words = [*sizes, rounds, *cpus, priority or 0, int(past)]
    out = subprocess.run([program, *map(str, words)], stdout=subprocess.PIPE, check=True, timeout=60).stdout
    return json.loads(out)


def is_installed(python: str, module: str) -> bool:
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", probe]).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cpus", default="0,1")
    parser.add_argument("--json")
    parser.add_argument("--python", action="append", default=[], help="nixl=PATH: another interpreter for a system")
    parser.add_argument("--systems", action="append", help="only native and these")
    for hidden in ("--side", "--system", "--sizes", "--where"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--realtime", metavar="PRIORITY", help="SCHED_FIFO for both sides while the clock runs")
    given = parser.parse_args()
    if given.realtime:
        os.environ["ROUND_TRIP_REALTIME"] = given.realtime
    if given.side:
        sizes, rounds = SIZES[given.sizes], given.rounds
        match given.system:
            case "native":
                native(given.side, sizes, rounds, given.where)
            case "nixl":
                nixl(given.side, sizes, rounds, given.where)
            case "fserver_lib, torch":
                fserver(given.side, sizes, rounds, given.where, "torch")
            case "fserver_lib, numpy":
                fserver(given.side, sizes, rounds, given.where, "numpy")
        return
    cpus = [int(cpu) for cpu in given.cpus.split(",")]
    pythons = dict(pair.split("=", 1) for pair in given.python)
    systems = {"native": None, "fserver_lib, numpy": "numpy", "fserver_lib, torch": "torch", "nixl": "nixl"}
    if given.systems:
        systems = {name: module for name, module in systems.items() if name == "native" or name in given.systems}
    systems = {
        name: pythons.get(name, sys.executable)
        for name, module in systems.items()
        if module is None or is_installed(pythons.get(name, sys.executable), module)
    }
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(folder)
        bare = [COPIES, PAST, SIGNALS] if program else []
        turns: dict[str, dict[str, list[dict[str, float]]]] = {
            sizes: {name: [] for name in [*systems, *bare]} for sizes in SIZES
        }
        for _ in range(given.turns):
            for name in [*systems, *bare]:
                for sizes in SIZES:
                    rounds = given.rounds if "KiB" not in sizes or name == "native" else max(given.rounds // 5, 100)
                    if name in systems:
                        one = turn(name, sizes, rounds, cpus, systems[name])
                    else:
                        copied = (0, 0) if name == SIGNALS else SIZES[sizes]
                        one = copies(program or "", copied, rounds, cpus, given.realtime, name == PAST)
                    turns[sizes][name].append(one)
    results = {
        sizes: {
            name: {
                "p50": min(one["p50"] for one in many),
                "p50_most": max(one["p50"] for one in many),
                "p99": min(one["p99"] for one in many),
            }
            for name, many in of.items()
        }
        for sizes, of in turns.items()
    }
    print(f"{'':20} {'system':20} {'p50 us':>8} {'(-most)':>9} {'p99 us':>8} {'/ native':>9} {'/ nixl':>7}")
    for sizes, of in results.items():
        for name, figures in of.items():
            peer = figures["p50"] / of["nixl"]["p50"] if "nixl" in of else float("nan")
            print(
                f"{sizes:20} {name:20} {figures['p50']:8.2f} {figures['p50_most']:9.2f} {figures['p99']:8.2f}"
                f" {figures['p50'] / of['native']['p50']:9.2f} {peer:7.2f}"
            )
        if bare:
            native_us, plain_us, past_us, signals_us = (of[name]["p50"] for name in ("native", *bare))
            least = native_us + min(plain_us, past_us) - signals_us
            print(f"{sizes:20} native and four copies: {least:.2f} us, {least / native_us:.2f} x native")
    small, large = (of["native"]["p50"] for of in results.values())
    print(f"native, in place: large / small = {large / small:.2f}")
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"command": sys.argv, "turns": given.turns, "rounds": given.rounds, "us": results}, file, indent=1)


if __name__ == "__main__":
    main()
