"""Deployments of real processes: one scheduler, each member its own interpreter."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent

#: What every member's program begins with.
PRELUDE = """
import os, sys, time, random, zlib
import numpy as np
import fserver_lib as f
import stepmesh
from stepmesh import errors
TORCH = os.environ.get("STEPMESH_TENSORS") == "torch"
if TORCH:
    import torch
    torch.set_num_threads(1)
def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array)) if TORCH else np.ascontiguousarray(array)
def array(tensor):
    return tensor.numpy() if TORCH else tensor
RANK = int(os.environ.get("DMLC_NODE_RANK", "0"))
WORKERS = int(os.environ.get("DMLC_NUM_WORKER", "1"))
SERVERS = int(os.environ.get("DMLC_NUM_SERVER", "1"))
"""


def free_port(count: int = 1) -> int:
    """A port below the ephemeral ones, with `count - 1` free ones after it."""
    base = 20000 + os.getpid() * 37 % 9000
    for port in range(base, base + 3000, count):
        sockets = []
        try:
            for offset in range(count):
                probe = socket.socket()
                sockets.append(probe)
                probe.bind(("127.0.0.1", port + offset))
            return port
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
    raise RuntimeError("no free port")


class Deployment:
    """A scheduler in this process's child and members as programs."""

    def __init__(self, workers: int, servers: int, transport: str, **environment: object) -> None:
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "DMLC_PS_ROOT_URI": "127.0.0.1",
            "DMLC_PS_ROOT_PORT": str(free_port(int(str(environment.get("DMLC_GROUP_SIZE", 1))) + 1)),
            "DMLC_NUM_WORKER": str(workers),
            "DMLC_NUM_SERVER": str(servers),
            "STEPMESH_TRANSPORT": transport,
            "STEPMESH_SLOT_BYTES": str(1 << 20),
            "STEPMESH_TENSORS": os.environ.get("STEPMESH_TEST_TENSORS", "numpy"),
            "STEPMESH_INIT_TIMEOUT": "90",
            "STEPMESH_STOP_TIMEOUT": "90",
            **{name: str(value) for name, value in environment.items()},
        }
        self.processes: list[tuple[str, subprocess.Popen[str]]] = []

    def start(self, role: str, rank: int, program: str, **environment: object) -> subprocess.Popen[str]:
        own = {"DMLC_ROLE": role, "DMLC_NODE_RANK": str(rank), **{k: str(v) for k, v in environment.items()}}
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(program)],
            env={**self.environment, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append((f"{role} {rank}", process))
        return process

    def scheduler(self) -> subprocess.Popen[str]:
        return self.start("scheduler", 0, "f.init()\nf.stop()")

    def finish(self, timeout: float = 120.0) -> dict[str, str]:
        """Waits for all; what each has printed. Fails if one has failed."""
        deadline = time.monotonic() + timeout
        printed, failed = {}, []
        for name, process in self.processes:
            try:
                # After the first failure the others, which may wait for it, get a moment to say what they saw.
                left = 2.0 if failed else max(deadline - time.monotonic(), 1)
                out, err = process.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                err += "\nkilled: it did not end in time"
            printed[name] = out
            if process.returncode != 0:
                failed.append(f"{name} ended with {process.returncode}:\n{err}\n{out}")
        assert not failed, "\n".join(failed)
        return printed

    def kill(self) -> None:
        for _, process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture
def deploy():
    """Makes deployments, and ends what is left of them."""
    made: list[Deployment] = []

    def deploy(workers: int, servers: int, transport: str = "shm", **environment: object) -> Deployment:
        made.append(Deployment(workers, servers, transport, **environment))
        return made[-1]

    yield deploy
    for deployment in made:
        deployment.kill()


def run(deployment: Deployment, worker: str, server: str, timeout: float = 120.0) -> dict[str, str]:
    """One program for all workers, one for all servers."""
    deployment.scheduler()
    for rank in range(int(deployment.environment["DMLC_NUM_SERVER"])):
        deployment.start("server", rank, server)
    for rank in range(int(deployment.environment["DMLC_NUM_WORKER"])):
        deployment.start("worker", rank, worker)
    return deployment.finish(timeout)


@pytest.fixture(name="run")
def run_fixture():
    return run
