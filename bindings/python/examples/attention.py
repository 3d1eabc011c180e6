"""The attention side of the example: `python attention.py SCHEDULER_URL [STEPS]`.

Three parts travel for each layer: the hidden state, the experts that the router chose, and their weights. They are made in
the send slot; the partial sums of all FFN instances are read where they landed, and added up.
"""

import sys

import torch
from moe import HIDDEN, LAYERS, ROWS, TOP_K, Attention, Experts, layers

import stepmesh

LAYOUT = stepmesh.Layout(
    request=[
        stepmesh.PartSpec(HIDDEN * 4, ROWS),
        stepmesh.PartSpec(TOP_K * 4, ROWS),
        stepmesh.PartSpec(TOP_K * 4, ROWS),
    ],
    reply=[stepmesh.PartSpec(HIDDEN * 4, ROWS)],
    microbatches=2,
)


def remote(mesh: stepmesh.AttentionMesh, microbatch: int, layer: int, tensors: tuple[torch.Tensor, ...]):
    """Sends a layer's hidden state, and returns the ticket."""
    buffer = mesh.acquire(microbatch)
    parts = [buffer.put(index, tensor) for index, tensor in enumerate(tensors)]
    return mesh.push_pull(buffer, parts, group=layer, leave=layer == LAYERS - 1)


@torch.no_grad()
def main(url: str, steps: int) -> None:
    attention, check = layers(Attention), layers(Experts)
    options = stepmesh.Options(url, LAYOUT, name="attention", workload="moe example")
    with stepmesh.AttentionMesh(options) as mesh:
        mesh.wait_complete()
        for step in range(steps):
            # Two microbatches: while one is with the FFN side the other one is computed here.
            x = [torch.randn(ROWS - step % 3, HIDDEN) for _ in range(2)]
            expected = [tensor.clone() for tensor in x]
            tickets = [None, None]
            for layer in range(LAYERS):
                for microbatch in range(2):
                    if tickets[microbatch] is not None:
                        x[microbatch] = x[microbatch] + total(mesh.wait(tickets[microbatch]))
                    x[microbatch], *sent = attention[layer](x[microbatch])
                    tickets[microbatch] = remote(mesh, microbatch, layer, tuple(sent))
            for microbatch in range(2):
                x[microbatch] = x[microbatch] + total(mesh.wait(tickets[microbatch]))
                for layer in range(LAYERS):
                    expected[microbatch], *sent = attention[layer](expected[microbatch])
                    expected[microbatch] = expected[microbatch] + check[layer](*sent)
                assert torch.allclose(x[microbatch], expected[microbatch], atol=1e-4), "the sides disagree"
    print(f"{steps} steps of {LAYERS} layers, each as in one process")


def total(reply: stepmesh.Reply) -> torch.Tensor:
    """The sum of the partial sums, in rank order."""
    return sum(stepmesh.torch(reply.tensor(rank)) for rank in range(len(reply)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10)
