"""Muon (K. Jordan and others, 2024): momentum whose matrix is made orthogonal before each step. It learns from fewer tokens
than AdamW does."""

import torch

# Newton-Schulz: five steps of this odd polynomial bring every singular value near 1.
STEPS, A, B, C = 5, 3.4445, -4.7750, 2.0315


def orthogonal(matrices):
    """The nearest matrices `[.., rows, cols]` whose singular values are about 1."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(STEPS):
        square = x @ x.mT
        x = A * x + (B * square + C * (square @ square)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weight matrices, alone or stacked `[.., rows, cols]`. The step's size matches AdamW's at the same rate."""

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(average, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * max(weight.shape[-2:]) ** 0.5 * group["lr"])
