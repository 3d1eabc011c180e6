"""The two ways in which engines call StepMesh, between groups of two processes."""

from __future__ import annotations

import pytest

# SGLang's: the FFN's rank 0 imports the module, starts the scheduler as a daemonic child, and only then joins. Four pushes
# and one pull a layer; keys are ranges, handed out per shape as shapes come up; a step without tokens pushes one tensor that
# describes shapes and pulls it back; replies say need_event.
SGLANG_SERVER = """
import multiprocessing

def schedule():
    os.environ["DMLC_ROLE"] = "scheduler"
    f.init()
    while True:
        time.sleep(3600)

if __name__ == "__main__":
    if os.environ["STEPMESH_GPU"] == "0":
        multiprocessing.get_context("fork").Process(target=schedule, daemon=True).start()
    f.init()
    while True:
        batch = f.get_batch()
        if not batch:
            break
        for handler, tensors, keys in batch:
            if len(tensors) == 1:
                f.respond([tensors[0]], handler, True)
                continue
            hidden, weights, ids, logits = tensors
            assert len(keys) == 4 and keys == list(range(keys[0], keys[0] + 4))
            assert array(ids).dtype == np.int32 and array(logits).shape == (array(hidden).shape[0], 8)
            result = array(hidden) * array(weights).sum(axis=1, keepdims=True)
            f.respond([tensor(result.astype(np.float32))], handler, True)
    f.stop()
"""
SGLANG_WORKER = """
if __name__ == "__main__":
    f.init()
    rng = np.random.default_rng(int(os.environ["STEPMESH_GPU"]))
    cache, next_key = {}, 0
    for step in range(12):
        tokens = [0, 3, 7, 0, 16, 3][step % 6]
        for layer in range(4):
            if tokens == 0:
                shapes = tensor(np.array([0, 32], np.int32))
                back = tensor(np.zeros(2, np.int32))
                f.wait(f.push_pull([shapes], range(1 << 30, (1 << 30) + 1), [back], range(1 << 31, (1 << 31) + 1)))
                assert (array(back) == [0, 32]).all()
                continue
            if tokens not in cache:
                out = tensor(np.zeros((tokens, 32), np.float32))
                cache[tokens] = (range(next_key, next_key + 4), out, range(next_key + 4, next_key + 5))
                next_key += 5
            keys, out, pull_keys = cache[tokens]
            hidden = rng.random((tokens, 32), np.float32)
            weights = rng.random((tokens, 2), np.float32)
            ids = rng.integers(0, 8, (tokens, 2), np.int32)
            logits = rng.random((tokens, 8), np.float32)
            handler = f.push_pull([tensor(t) for t in (hidden, weights, ids, logits)], keys, [out], pull_keys)
            f.wait(handler)
            assert np.allclose(array(out), hidden * weights.sum(axis=1, keepdims=True)), (step, layer)
    f.stop()
    print("right")
"""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_sglang_calls_it_so(deploy, transport):
    deployment = deploy(1, 1, transport, DMLC_GROUP_SIZE=2)
    for gpu in range(2):
        deployment.start("server", 0, SGLANG_SERVER, STEPMESH_GPU=gpu)
        deployment.start("worker", 0, SGLANG_WORKER, STEPMESH_GPU=gpu)
    printed = deployment.finish()
    assert printed["worker 0"] == "right\n"


# vLLM's draft: buffers of the most tokens, slices of them pushed under one key for each stage, so that rows vary under a
# key; the FFN side reads the rows off what arrived, joins them in node order, and answers with a part of one buffer.
VLLM_SERVER = """
f.init()
returned = tensor(np.zeros((WORKERS * 16, 24), np.float32))
while batch := f.get_batch():
    parts = [array(tensors[0]) for _, tensors, _ in batch]
    assert [keys[0] // 10**6 for _, _, keys in batch] == list(range(WORKERS))
    output = np.concatenate(parts) * 2
    start = 0
    for (handler, tensors, _), part in zip(batch, parts):
        array(returned)[: len(part)] = output[start : start + len(part)]
        f.respond_vec(returned, [tensors[0]], [handler])
        start += len(part)
f.stop()
"""
VLLM_WORKER = """
f.init()
stages = 3
send = [tensor(np.zeros((16, 24), np.float32)) for _ in range(stages)]
receive = [[tensor(np.zeros((16, 24), np.float32)) for _ in range(SERVERS)] for _ in range(stages)]
random.seed(RANK)
for layer in range(10):
    rows, events = [], []
    for stage in range(stages):
        rows.append(random.randint(0, 16))
        array(send[stage])[: rows[-1]] = RANK * 100 + layer
        events.append(f.push_pull(
            [send[stage][: rows[-1]]],
            [stage + RANK * 10**6],
            [buffer[: rows[-1]] for buffer in receive[stage]],
            [stage + 1000 + server * 100 for server in range(SERVERS)],
        ))
    for stage in range(stages):
        f.wait(events[stage], timeout_ms=50000)
        for buffer in receive[stage]:
            assert (array(buffer)[: rows[stage]] == 2 * (RANK * 100 + layer)).all()
f.stop()
"""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_vllm_calls_it_so(deploy, run, transport):
    run(deploy(2, 2, transport), VLLM_WORKER, VLLM_SERVER)


CONNECTOR = """
import types
from stepmesh.vllm import StepMeshAFDConnector, TransferMetadata, TransferContext, F2APayload
ROLE = "attention" if os.environ["DMLC_ROLE"] == "worker" else "ffn"
LAYERS, STAGES, HIDDEN = 5, 4, 16
afd = types.SimpleNamespace(
    role=ROLE, host="127.0.0.1", port=int(os.environ["DMLC_PS_ROOT_PORT"]), afd_server_rank=RANK,
    num_attention_servers=WORKERS, num_ffn_servers=SERVERS, num_afd_stages=STAGES,
    compute_gate_on_attention=True,
    afd_extra_config=dict(hidden_size=HIDDEN, max_tokens=32, element_bytes=4, router_columns=6, timeout=20.0,
                          transport=os.environ["STEPMESH_TRANSPORT"], tensors=os.environ["STEPMESH_TENSORS"],
                          reduce=os.environ["REDUCE"]))
connector = StepMeshAFDConnector(RANK, RANK, types.SimpleNamespace(afd_config=afd))
assert not connector.is_initialized
connector.init_afd_connector()
assert connector.is_initialized
"""
CONNECTOR_FFN = (
    CONNECTOR
    + """
for step in range(3):
    plan = connector.control_plane.recv_dp_metadata_list()
    assert plan == {"step": step}, plan
    for layer in range(LAYERS):
        for stage in range(STAGES):
            payload = connector.recv_attn_output(ubatch_idx=stage)
            metadata = payload.context.metadata
            assert (metadata.layer_idx, metadata.stage_idx) == (layer, stage), metadata
            hidden = array(payload.hidden_states)
            assert metadata.validate_tensor_shape(hidden.shape)
            own = range(WORKERS) if os.environ["REDUCE"] == "sum" else range(RANK, WORKERS, SERVERS)
            assert metadata.seq_lens == [(step + stage + rank) % 4 * 8 for rank in own], metadata
            if len(hidden) and layer > 0:
                assert (array(payload.router_logits).argmax(axis=1) == layer).all()
            else:
                assert payload.router_logits is None
            output = hidden * (RANK + 2)
            if layer == 3:
                connector.send_ffn_output(F2APayload(tensor(output), tensor(hidden)), payload.context)
            else:
                connector.send_ffn_output(tensor(output), payload.context)
connector.receive_control()
connector.close()
"""
)
CONNECTOR_ATTENTION = (
    CONNECTOR
    + """
factor = sum(range(2, SERVERS + 2)) if os.environ["REDUCE"] == "sum" else RANK % SERVERS + 2
for step in range(3):
    connector.control_plane.send_dp_metadata_list({"step": step})
    for layer in range(LAYERS):
        sent = []
        for stage in range(STAGES):
            tokens = (step + stage + RANK) % 4 * 8
            hidden = tensor(np.full((tokens, HIDDEN), 1.0 + layer + 10 * stage, np.float32))
            metadata = TransferMetadata.create_attention_metadata(layer_idx=layer, stage_idx=stage, seq_len=tokens)
            logits = np.zeros((tokens, 6), np.float32)
            logits[:, layer] = 1
            more = {"router_logits": tensor(logits)} if layer > 0 else {}
            connector.send_attn_output(hidden, TransferContext(metadata), **more)
            sent.append(hidden)
        for stage in range(STAGES):
            out = tensor(np.zeros_like(array(sent[stage])))
            got = connector.recv_ffn_output(out, ubatch_idx=stage)
            if layer == 3 and len(out) == 0:
                continue
            if layer == 3:
                assert (array(got.routed_output) == array(sent[stage]) * factor).all()
                share = SERVERS if os.environ["REDUCE"] == "sum" else 1
                assert (array(got.shared_output) == array(sent[stage]) * share).all()
            else:
                assert got is out and (array(out) == array(sent[stage]) * factor).all(), (layer, stage)
connector.send_control(b"bye")
try:
    connector.recv_ffn_output(out, ubatch_idx=0)
except LookupError as error:
    assert "ubatch_idx" in str(error)
else:
    raise AssertionError("nothing was sent")
time.sleep(0.5)
connector.close()
assert not connector.is_initialized
"""
)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("attention, ffn, reduce", [(2, 2, "sum"), (3, 2, "paired"), (1, 2, "paired")])
def test_the_vllm_connector_moves_layers_of_any_ratio(deploy, transport, attention, ffn, reduce):
    deployment = deploy(attention, ffn, transport, REDUCE=reduce)
    for rank in range(ffn):
        deployment.start("server", rank, CONNECTOR_FFN)
    for rank in range(attention):
        deployment.start("worker", rank, CONNECTOR_ATTENTION)
    deployment.finish()


def test_the_connector_registers_itself_where_the_plugin_is(tmp_path, monkeypatch):
    import stepmesh.vllm

    assert stepmesh.vllm.register() is False
    plugin = tmp_path / "afd_plugin"
    (plugin / "connectors").mkdir(parents=True)
    (plugin / "__init__.py").write_text("")
    (plugin / "config.py").write_text("SUPPORTED_AFD_CONNECTORS = ('P2pNcclAFDConnector',)\n")
    (plugin / "connectors" / "__init__.py").write_text("")
    (plugin / "connectors" / "factory.py").write_text(
        "class AFDConnectorFactory:\n"
        "    registered = {}\n"
        "    @classmethod\n"
        "    def register_connector(cls, name, module_path, class_name, *, replace=False):\n"
        "        cls.registered[name] = (module_path, class_name)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert stepmesh.vllm.register() is True
    from afd_plugin import config
    from afd_plugin.connectors.factory import AFDConnectorFactory

    assert AFDConnectorFactory.registered == {"StepMeshAFDConnector": ("stepmesh.vllm", "StepMeshAFDConnector")}
    assert "StepMeshAFDConnector" in config.SUPPORTED_AFD_CONNECTORS
