"""An attention side whose FFN side is written in Rust: `python attention_plain.py SCHEDULER_URL [STEPS]`.

The FFN side (bindings/embed/examples/ffn.rs) applies a gated activation to each row: silu of its first half times the
second. No framework is needed: NumPy fills the slot.
"""

import sys

import numpy as np

import stepmesh

HIDDEN, ROWS, LAYERS = 64, 16, 4
LAYOUT = stepmesh.Layout([stepmesh.PartSpec(HIDDEN * 4, ROWS)], [stepmesh.PartSpec(HIDDEN * 2, ROWS)], 1)


def main(url: str, steps: int) -> None:
    options = stepmesh.Options(url, LAYOUT, name="attention", workload="gated rows")
    with stepmesh.AttentionMesh(options) as mesh:
        mesh.wait_complete()
        for step in range(steps):
            for layer in range(LAYERS):
                rows = (step + layer) % (ROWS + 1)
                buffer = mesh.acquire(0)
                x = stepmesh.numpy(buffer.tensor(0, (rows, HIDDEN), "float32"))
                x[:] = np.random.default_rng(step).standard_normal((rows, HIDDEN))
                part = stepmesh.Part(rows, HIDDEN * 4, "float32")
                reply = mesh.wait(mesh.push_pull(buffer, [part], group=layer, leave=layer == LAYERS - 1))
                gate, up = x[:, : HIDDEN // 2], x[:, HIDDEN // 2 :]
                expected = gate / (1 + np.exp(-gate)) * up
                assert np.allclose(stepmesh.numpy(reply.tensor()), expected, atol=1e-5), "the sides disagree"
    print(f"{steps} steps of {LAYERS} layers, each as in one process")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10)
