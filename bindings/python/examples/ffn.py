"""The FFN side of the example: `python ffn.py SCHEDULER_URL`. Serves until the attention side has gone.

The hidden states are read in the slots where they landed, the partial sum is written to the slot that is sent.
"""

import sys

import torch
from attention import LAYOUT
from moe import HIDDEN, Experts, layers

import stepmesh


def is_over(mesh: stepmesh.FfnMesh) -> bool:
    """Whether an attention instance has left."""
    while (event := mesh.next_event()) is not None:
        if event["kind"] in ("peer_lost", "scheduler_lost"):
            return True
    return False


@torch.no_grad()
def main(url: str) -> None:
    options = stepmesh.Options(url, LAYOUT, name="ffn", workload="moe example")
    with stepmesh.FfnMesh(options) as mesh:
        mesh.wait_complete()
        experts = layers(Experts, mesh.rank, mesh.ffn)
        answered = 0
        while not is_over(mesh):
            batch = mesh.next_batch(timeout=0.1)
            if batch is None:
                continue
            for segment in batch:
                hidden, chosen, weights = (stepmesh.torch(segment.tensor(part)) for part in range(3))
                out = stepmesh.torch(segment.reply(0, (segment.rows, HIDDEN), "float32"))
                out.copy_(experts[batch.group](hidden, chosen, weights))
                segment.set_reply([stepmesh.Part(segment.rows, HIDDEN * 4, "float32")])
            mesh.respond(batch)
            answered += 1
    print(f"{answered} batches answered")


if __name__ == "__main__":
    main(sys.argv[1])
