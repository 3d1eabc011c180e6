#!/usr/bin/env python3
"""The vLLM connector in captured CUDA graphs on a real GPU: a step of layers and microbatches, captured by PyTorch on both sides and
replayed, with eager steps in between.

    PYTHONPATH=DIR python3 scripts/gpu/connector.py [--steps N]       # DIR holds the wheel's packages

Prints one line of JSON with the time of a replayed step of the paper's sizes, whose layers compute next to nothing. Ends with 1 and
says why if anything is wrong, with 77 if PyTorch or the GPU is missing.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
import types

LAYERS, STAGES, TOKENS, HIDDEN = 61, 3, 128, 7168
#: Which step runs eagerly: every so many.
EAGER = 10


def connect(torch, role: str, port: int):
    from stepmesh.vllm import StepMeshAFDConnector

    afd = types.SimpleNamespace(
        role=role, host="127.0.0.1", port=port, afd_server_rank=0, num_attention_servers=1, num_ffn_servers=1,
        num_afd_stages=STAGES,
        afd_extra_config={"hidden_size": HIDDEN, "max_tokens": TOKENS, "gpu": 0, "timeout": 60.0, "transport": "shm"},
    )
    shape = types.SimpleNamespace(num_hidden_layers=LAYERS)
    model = types.SimpleNamespace(dtype=torch.bfloat16, hf_config=shape)
    made = StepMeshAFDConnector(0, 0, types.SimpleNamespace(afd_config=afd, model_config=model))
    made.init_afd_connector()
    return made


def capture(torch, body):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = body()
    return graph, kept


def layers_of_ffn(connector) -> list:
    kept = []
    for layer in range(LAYERS):
        for stage in range(STAGES):
            payload = connector.recv_attn_output(ubatch_idx=stage)
            # Adds what says which layer it was; small whole numbers are exact in bf16.
            kept += [payload.hidden_states, payload.hidden_states + (layer % 2)]
            connector.send_ffn_output(kept[-1], payload.context)
    return kept


def layers_of_attention(connector, states) -> None:
    from stepmesh.vllm import TransferContext, TransferMetadata

    for layer in range(LAYERS):
        for stage, state in enumerate(states):
            if layer > 0:
                connector.recv_ffn_output(state, ubatch_idx=stage)
            connector.send_attn_output(state, TransferContext(TransferMetadata(layer, stage, [len(state)])))
    for stage, state in enumerate(states):
        connector.recv_ffn_output(state, ubatch_idx=stage)


def serve(torch, port: int) -> None:
    connector = connect(torch, "ffn", port)
    counts = types.SimpleNamespace(num_tokens_across_dp_cpu=[TOKENS])
    connector.control_plane.update_state_from_dp_metadata(
        types.SimpleNamespace(dp_metadata_list={stage: counts for stage in range(STAGES)})
    )
    graph, kept = capture(torch, lambda: layers_of_ffn(connector))
    while (plan := connector.control_plane.recv_dp_metadata_list()) != "end":
        if plan == "replay":
            graph.replay()
        else:
            kept = layers_of_ffn(connector)
    torch.cuda.synchronize()
    connector.close()
    del kept


def ask(torch, port: int, steps: int) -> None:
    connector = connect(torch, "attention", port)
    states = [torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda:0") for _ in range(STAGES)]
    graph, _ = capture(torch, lambda: layers_of_attention(connector, states))
    times = []
    for step in range(steps):
        for stage, state in enumerate(states):
            state.fill_(step % 7 + stage)
        torch.cuda.synchronize()
        plan = "eager" if step % EAGER == EAGER - 1 else "replay"
        began = time.perf_counter_ns()
        connector.control_plane.send_dp_metadata_list(plan)
        if plan == "replay":
            graph.replay()
        else:
            layers_of_attention(connector, states)
        torch.cuda.synchronize()
        if plan == "replay":
            times.append((time.perf_counter_ns() - began) / 1e3)
        for stage, state in enumerate(states):
            wanted = step % 7 + stage + LAYERS // 2
            assert bool((state == wanted).all()), f"step {step} ({plan}), stage {stage}: another result"
    connector.control_plane.send_dp_metadata_list("end")
    time.sleep(0.5)
    connector.close()
    print(json.dumps({
        "layers": LAYERS,
        "microbatches": STAGES,
        "tokens": TOKENS,
        "steps": steps,
        "step_p50_us": round(statistics.median(times), 1),
        "layer_p50_us": round(statistics.median(times) / LAYERS, 1),
    }))


def main() -> int:
    try:
        import torch
    except ImportError:
        print("left out: no PyTorch")
        return 77
    if not torch.cuda.is_available():
        print("left out: PyTorch finds no GPU")
        return 77
    steps = int(sys.argv[sys.argv.index("--steps") + 1]) if "--steps" in sys.argv else 200
    if "--role" in sys.argv:
        role, port = sys.argv[sys.argv.index("--role") + 1], int(os.environ["CONNECTOR_PORT"])
        serve(torch, port) if role == "ffn" else ask(torch, port, steps)
        return 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment = {**os.environ, "CONNECTOR_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, os.path.abspath(__file__), "--steps", str(steps), "--role"]
    ffn = subprocess.Popen([*command, "ffn"], env=environment)
    attention = subprocess.Popen([*command, "attention"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        printed, _ = attention.communicate(timeout=100)
        failed = attention.returncode != 0 or ffn.wait(20) != 0
    except subprocess.TimeoutExpired:
        print("it did not end in time")
        return 1
    finally:
        for one in (ffn, attention):
            if one.poll() is None:
                one.kill()
                one.communicate()
    print(printed.strip())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
