#!/usr/bin/env python3
"""fserver_lib with PyTorch's tensors on a real GPU: requests and answers behind the streams that make them, notifications, flags.

    PYTHONPATH=DIR python3 scripts/gpu/fserver.py [--rounds N]        # DIR holds the wheel's packages

Prints one line of JSON with the median round trip of the paper's sizes (128 tokens), copies by copy engines each way included. Ends
with 1 and says why if anything is wrong, with 77 if PyTorch or the GPU is missing.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time

TOKENS, HIDDEN = 128, 7168
#: Long enough that whoever does not wait for the stream is early, in clock cycles of the GPU.
LONG = 2_000_000


def serve(torch, f) -> None:
    while batch := f.get_batch():
        for handler, tensors, _ in batch:
            hidden = tensors[0]
            assert hidden.is_cuda
            if hidden.dtype == torch.float32:
                torch.cuda._sleep(LONG)
                f.respond([hidden * 2 + tensors[1]], handler, True)
            else:
                f.respond([answer(torch, hidden.shape[0])], handler, True)


def answer(torch, tokens: int, made: dict = {}) -> object:
    if tokens not in made:
        made[tokens] = torch.full((tokens, HIDDEN), 3.0, dtype=torch.bfloat16, device="cuda:0")
    return made[tokens]


def check_requests(torch, f) -> None:
    for number in range(100):
        rows = 1 + number % 7
        torch.cuda._sleep(LONG)
        hidden = torch.rand(rows, 512, device="cuda:0")
        bias = torch.full((rows, 512), float(number))
        pull = torch.zeros(rows, 512, device="cuda:0")
        handler = f.push_pull([hidden, bias], [1, 2], [pull], [3], True)
        f.wait(handler)
        assert torch.equal(pull, hidden * 2 + number), f"round {number}: the answer is another"
        assert f.fetch_trace(handler).copied_bytes == 6 * hidden.nbytes


def check_notifications(torch, f) -> None:
    notify = f.SimpleNotify()
    notify.init()
    for number in range(150):
        hidden = torch.full((2, 512), float(number), device="cuda:0")
        pull = torch.zeros(2, 512, device="cuda:0")
        handler = f.push_pull([hidden, torch.zeros(2, 512)], [1, 2], [pull], [3], True)
        notify.stream_wait_event(handler)
        # Launched before the answer is there; the stream holds it until then.
        seen = pull.clone()
        notify.wait_event_done()
        torch.cuda.synchronize()
        assert bool((seen == 2 * number).all()), f"notification {number}: the stream went on too early"


def check_flags(torch, f) -> None:
    host = torch.zeros(1, dtype=torch.int64).pin_memory()
    flag, seq = f.map_pinned_tensor(host, "cuda:0"), torch.zeros(1, dtype=torch.int64, device="cuda:0")
    for number in range(1, 50):
        f.seq_add_one(seq)
        torch.cuda._sleep(LONG)
        f.write_flag(flag, seq)
        assert int(host[0]) < number, "the flag was set before the work in front of it was done"
        torch.cuda.synchronize()
        assert int(host[0]) == number and int(seq[0]) == number
    f.seq_add_one(seq)
    f.wait_flag(flag, seq)
    after = torch.ones(1, device="cuda:0")
    event = torch.cuda.Event()
    event.record()
    time.sleep(0.01)
    assert not event.query(), "the stream did not wait for the flag"
    host[0] += 1
    event.synchronize()
    assert float(after[0]) == 1


def measure(torch, f, rounds: int) -> list[float]:
    hidden = torch.ones(TOKENS, HIDDEN, dtype=torch.uint8, device="cuda:0")
    pull = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda:0")
    times = []
    for _ in range(rounds + 50):
        began = time.perf_counter_ns()
        f.wait(f.push_pull([hidden], [5], [pull], [6], True))
        times.append((time.perf_counter_ns() - began) / 1e3)
    assert bool((pull == 3).all())
    return times[50:]


def member(role: str, rounds: int) -> None:
    import torch

    import fserver_lib as f

    f.init()
    if role == "server":
        serve(torch, f)
    elif role == "worker":
        for check in (check_requests, check_notifications, check_flags):
            check(torch, f)
            print(f"{check.__name__} passed", file=sys.stderr)
        times = measure(torch, f, rounds)
        print(json.dumps({
            "tokens": TOKENS,
            "a2f_bytes": TOKENS * HIDDEN,
            "f2a_bytes": 2 * TOKENS * HIDDEN,
            "p50_us": round(statistics.median(times), 1),
            "p99_us": round(sorted(times)[len(times) * 99 // 100], 1),
        }))
    f.stop()


def main() -> int:
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 500
    if "--role" in sys.argv:
        member(sys.argv[sys.argv.index("--role") + 1], rounds)
        return 0
    try:
        import torch
    except ImportError:
        print("left out: no PyTorch")
        return 77
    if not torch.cuda.is_available():
        print("left out: PyTorch finds no GPU")
        return 77
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DMLC_PS_ROOT_URI": "127.0.0.1",
        "DMLC_PS_ROOT_PORT": str(port),
        "DMLC_NUM_WORKER": "1",
        "DMLC_NUM_SERVER": "1",
        "STEPMESH_BAKCEND": "GPU",
        "STEPMESH_GPU": "0",
        "STEPMESH_INIT_TIMEOUT": "60",
        "STEPMESH_STOP_TIMEOUT": "30",
    }
    command = [sys.executable, os.path.abspath(__file__), "--rounds", str(rounds), "--role"]
    members = [
        subprocess.Popen([*command, role], env={**environment, "DMLC_ROLE": role}, stdout=subprocess.PIPE, text=True)
        for role in ("scheduler", "server", "worker")
    ]
    try:
        printed, _ = members[2].communicate(timeout=100)
        failed = members[2].returncode != 0
        for other in members[:2]:
            failed |= (other.wait(5 if failed else 40)) != 0
    except subprocess.TimeoutExpired:
        print("it did not end in time")
        return 1
    finally:
        for one in members:
            if one.poll() is None:
                one.kill()
                one.communicate()
    print(printed.strip())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
