"""A small mixture-of-experts layer in PyTorch, as the two examples split it: what both sides must agree on."""

import torch

HIDDEN, EXPERTS, TOP_K, INTERMEDIATE, LAYERS, ROWS = 64, 8, 2, 96, 4, 16


class Attention(torch.nn.Module):
    """The attention side of one layer: attention, norm and router."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.router = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        x = x + self.attention(x[None], x[None], x[None], need_weights=False)[0][0]
        hidden = self.norm(x)
        weights, experts = torch.softmax(self.router(hidden), -1).topk(TOP_K)
        return x, hidden, experts.to(torch.int32), weights


class Experts(torch.nn.Module):
    """The FFN side of one layer: of all experts those that this instance holds."""

    def __init__(self, rank: int = 0, instances: int = 1) -> None:
        super().__init__()
        every = [(torch.randn(INTERMEDIATE, HIDDEN) / 8, torch.randn(HIDDEN, INTERMEDIATE) / 8) for _ in range(EXPERTS)]
        self.held = {index: every[index] for index in range(rank, EXPERTS, instances)}

    def forward(self, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for index, (up, down) in self.held.items():
            row, choice = (experts == index).nonzero(as_tuple=True)
            expert = torch.nn.functional.silu(hidden[row] @ up.T) @ down.T
            out.index_add_(0, row, expert * weights[row, choice, None])
        return out


def layers(kind: type, *arguments: int) -> list[torch.nn.Module]:
    """The same weights in every process."""
    torch.manual_seed(0 if kind is Attention else 1)
    with torch.no_grad():
        return [kind(*arguments) for _ in range(LAYERS)]
