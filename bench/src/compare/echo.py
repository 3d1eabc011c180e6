"""One request of so many bytes and one reply, again and again, between two processes that spin, by a system that a program
in Python would use. Prints the median of the rounds.

    echo.py version SYSTEM
    echo.py run SYSTEM PROVIDER A2F_BYTES F2A_BYTES SECONDS ATTENTION_CPU FFN_CPU

The parent is the attention side. Nobody reads or makes the payload while the clock runs; that it arrives is checked before.
"""

import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import time

WARM_UP = 200
# Both sides end by themselves, whatever the other does.
PATIENCE = 45


class Pipe:
    """How the two sides tell each other where they are."""

    def __init__(self, read, write):
        self.read, self.write = os.fdopen(read, "rb"), os.fdopen(write, "wb")

    def tell(self, data):
        self.write.write(len(data).to_bytes(8, "little") + data)
        self.write.flush()

    def hear(self):
        length = self.read.read(8)
        if len(length) < 8:
            raise EOFError("the other side is gone")
        return self.read.read(int.from_bytes(length, "little"))


class ZeroMq:
    """Arrays over a pair of sockets; what is sent is copied by the library, what comes is copied into an array."""

    def __init__(self, side, provider, own, other, pipe):
        import numpy
        import zmq

        self.zmq = zmq
        self.socket = zmq.Context().socket(zmq.PAIR)
        if side == "ffn":
            folder = tempfile.mkdtemp()
            self.socket.bind("tcp://127.0.0.1:*" if provider == "tcp" else f"ipc://{folder}/echo")
            pipe.tell(self.socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0"))
        else:
            self.socket.connect(pipe.hear().decode())
        self.sent, self.landed = numpy.zeros(own, numpy.uint8), numpy.zeros(other, numpy.uint8)
        self.numpy = numpy

    def send(self):
        self.socket.send(self.sent, copy=True)

    def receive(self):
        while True:
            try:
                data = self.socket.recv(self.zmq.NOBLOCK)
            except self.zmq.Again:
                continue
            self.landed[:] = self.numpy.frombuffer(data, self.numpy.uint8)
            return


class Nixl:
    """One-sided writes with a notification, prepared once."""

    def __init__(self, side, provider, own, other, pipe):
        import numpy
        from nixl._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(side, nixl_agent_config(enable_prog_thread=False, backends=[]))
        self.agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
        self.sent, self.landed = numpy.zeros(own, numpy.uint8), numpy.zeros(other, numpy.uint8)
        memory = [(array.ctypes.data, array.nbytes, 0, "") for array in (self.sent, self.landed)]
        self.agent.register_memory(self.agent.get_reg_descs(memory, "DRAM"))
        landing = self.agent.get_xfer_descs([(self.landed.ctypes.data, self.landed.nbytes, 0)], "DRAM")
        pipe.tell(self.agent.get_agent_metadata())
        pipe.tell(self.agent.get_serialized_descs(landing))
        peer = self.agent.add_remote_agent(pipe.hear())
        remote = self.agent.deserialize_descs(pipe.hear())
        source = self.agent.get_xfer_descs([(self.sent.ctypes.data, self.sent.nbytes, 0)], "DRAM")
        self.transfer = self.agent.initialize_xfer("WRITE", source, remote, peer, b"x")

    def send(self):
        state = self.agent.transfer(self.transfer)
        while state != "DONE":
            if state == "ERR":
                raise RuntimeError("the transfer failed")
            state = self.agent.check_xfer_state(self.transfer)

    def receive(self):
        while not self.agent.get_new_notifs():
            pass


class Mooncake:
    """Synchronous writes; the receiver polls the last byte, for nothing tells it."""

    def __init__(self, side, provider, own, other, pipe):
        import numpy
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", provider, "") != 0:
            raise RuntimeError("the engine does not start")
        self.sent, self.landed = numpy.zeros(own, numpy.uint8), numpy.zeros(other, numpy.uint8)
        for array in (self.sent, self.landed):
            if self.engine.register_memory(array.ctypes.data, array.nbytes) != 0:
                raise RuntimeError("memory cannot be registered")
        pipe.tell(json.dumps([self.engine.get_rpc_port(), self.landed.ctypes.data]).encode())
        port, self.address = json.loads(pipe.hear())
        self.peer = f"127.0.0.1:{port}"
        self.turn = 0

    def send(self):
        self.turn = self.turn % 250 + 1
        self.sent[-1] = self.turn
        status = self.engine.transfer_sync_write(self.peer, self.sent.ctypes.data, self.address, self.sent.nbytes)
        if status != 0:
            raise RuntimeError(f"the transfer failed: {status}")

    def receive(self):
        before = self.seen if hasattr(self, "seen") else 0
        while self.landed[-1] == before:
            pass
        self.seen = int(self.landed[-1])


SYSTEMS = {
    "zeromq_numpy": (ZeroMq, "zmq", "pyzmq"),
    "nixl": (Nixl, "nixl", "nixl"),
    "mooncake": (Mooncake, "mooncake", "mooncake-transfer-engine-non-cuda"),
}


def play(side, system, provider, sizes, seconds, cpu, pipe):
    own, other = sizes if side == "attention" else sizes[::-1]
    end = SYSTEMS[system][0](side, provider, own, other, pipe)
    end.sent[: min(8, own)] = 7
    pipe.tell(b"ready")
    pipe.hear()
    # The libraries' own threads have been started and stay where they may.
    os.sched_setaffinity(0, {cpu})
    if side == "ffn":
        while True:
            end.receive()
            end.send()
    times = []
    clock = time.perf_counter_ns
    until = None
    while until is None or clock() < until:
        began = clock()
        end.send()
        end.receive()
        times.append(clock() - began)
        if len(times) == 1 and int(end.landed[0]) != 7:
            raise RuntimeError("what arrived is not what was sent")
        if until is None and len(times) == WARM_UP:
            times, until = [], clock() + int(seconds * 1e9)
    times.sort()
    print(json.dumps({"p50_us": times[len(times) // 2] / 1e3, "rounds": len(times)}), flush=True)


def main():
    if sys.argv[1] == "version":
        module, package = SYSTEMS[sys.argv[2]][1:]
        __import__(module)
        __import__("numpy")
        names = (package, "mooncake-transfer-engine") if "mooncake" in package else (package,)
        for name in names:
            try:
                print(importlib.metadata.version(name))
                return
            except importlib.metadata.PackageNotFoundError:
                pass
        sys.exit(1)
    system, provider = sys.argv[2:4]
    sizes, seconds = [int(number) for number in sys.argv[4:6]], float(sys.argv[6])
    cpus = [int(number) for number in sys.argv[7:9]]
    there, back = os.pipe(), os.pipe()
    child = os.fork()
    signal.alarm(int(seconds) + PATIENCE)
    try:
        if child == 0:
            os.close(there[1])
            os.close(back[0])
            # What the libraries say is for nobody.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            play("ffn", system, provider, sizes, seconds, cpus[1], Pipe(there[0], back[1]))
        else:
            os.close(there[0])
            os.close(back[1])
            play("attention", system, provider, sizes, seconds, cpus[0], Pipe(back[0], there[1]))
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        status = 1
    if child:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # The libraries do not always survive the interpreter's end.
    os._exit(status)


main()
