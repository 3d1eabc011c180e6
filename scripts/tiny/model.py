"""Step-3's text model in PyTorch, small: multi-matrix factorisation attention with one key/value head, dense and MoE
layers with a shared expert. The arithmetic is that of the released model; tensor names are those of its checkpoints.
"""

from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Config:
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_attention_groups: int = 1
    head_dim: int = 64
    share_q_dim: int = 128
    vocab_size: int = 1024
    intermediate_size: int = 768
    moe_layers_enum: str = "1,2"
    moe_num_experts: int = 8
    moe_top_k: int = 3
    moe_intermediate_size: int = 128
    share_expert_dim: int = 256
    norm_expert_weight: bool = False
    max_position_embedding: int = 512
    max_seq_len: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0

    def is_moe(self, layer):
        return layer in map(int, self.moe_layers_enum.split(","))

    def json(self):
        return {"architectures": ["Step3TextForCausalLM"], "model_type": "step3_text", "torch_dtype": "bfloat16"} | asdict(
            self
        ) | {"rope_scaling": None, "tie_word_embeddings": False, "hidden_act": "silu"}


class Linear(nn.Module):
    """`x W^T`. With `quantised` set to a function it is applied to the input first: W8A8 on dequantised weights."""

    quantised = None

    def __init__(self, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)

    def forward(self, x):
        return F.linear(self.quantised(x) if self.quantised else x, self.weight)


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.q_proj = Linear(config.share_q_dim, config.hidden_size)
        self.k_proj = Linear(config.head_dim, config.hidden_size)
        self.v_proj = Linear(config.head_dim, config.hidden_size)
        self.inter_norm = Norm(config.share_q_dim, config.rms_norm_eps)
        self.wq = Linear(self.heads * self.head_dim, config.share_q_dim)
        self.o_proj = Linear(config.hidden_size, self.heads * self.head_dim)

    def forward(self, h, cos, sin, cache=None):
        rows, length, _ = h.shape
        q = self.wq(self.inter_norm(self.q_proj(h))).view(rows, length, self.heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(self.k_proj(h), cos, sin)
        v = self.v_proj(h)
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], 1), torch.cat([cache["v"], v], 1)
            cache["k"], cache["v"] = k, v
        shape = (rows, self.heads, k.shape[1], self.head_dim)
        k, v = k.unsqueeze(1).expand(shape), v.unsqueeze(1).expand(shape)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class Mlp(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.gate_proj = Linear(width, config.hidden_size)
        self.up_proj = Linear(width, config.hidden_size)
        self.down_proj = Linear(config.hidden_size, width)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Stacked(nn.Module):
    """The weights of all experts, stacked on the first dimension."""

    def __init__(self, experts, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, out_features, in_features) * in_features**-0.5)


class Experts(nn.Module):
    quantised = None

    def __init__(self, config):
        super().__init__()
        self.top_k, self.count, self.renormalise = config.moe_top_k, config.moe_num_experts, config.norm_expert_weight
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = Linear(self.count, hidden)
        self.gate_proj = Stacked(self.count, width, hidden)
        self.up_proj = Stacked(self.count, width, hidden)
        self.down_proj = Stacked(self.count, hidden, width)
        self.balance = 0.0

    def forward(self, y):
        flat = y.reshape(-1, y.shape[-1])
        probabilities = self.gate(flat).float().softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, -1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(flat.dtype)
        if self.training:
            # As Switch Transformers: the share of tokens times the mean probability, 1 when all experts are alike.
            share = F.one_hot(chosen, self.count).float().sum(1).mean(0) / self.top_k
            self.balance = self.count * (share * probabilities.mean(0)).sum()
        quantised = self.quantised or (lambda x: x)
        x, out = quantised(flat), torch.zeros_like(flat)
        for expert in range(self.count):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            taken = x[rows]
            gate, up = (F.linear(taken, proj.weight[expert]) for proj in (self.gate_proj, self.up_proj))
            part = F.linear(quantised(F.silu(gate) * up), self.down_proj.weight[expert])
            out.index_add_(0, rows, part * weights[rows, place, None])
        return out.view_as(y)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        if config.is_moe(layer):
            self.moe, self.share_expert = Experts(config), Mlp(config, config.share_expert_dim)
        else:
            self.mlp = Mlp(config, config.intermediate_size)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        y = self.post_attention_layernorm(x)
        return x + (self.moe(y) + self.share_expert(y) if hasattr(self, "moe") else self.mlp(y))


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class Step3(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.vocab_size, config.hidden_size)

    def forward(self, tokens, first=0, caches=None):
        """Logits `[rows, length, vocab]` of `tokens` `[rows, length]`, which stand at positions `first` onwards."""
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half).float() / half)
        angles = torch.arange(first, first + tokens.shape[1])[:, None].float() * frequencies
        x = self.model.embed_tokens(tokens)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, caches[index] if caches is not None else None)
        return self.lm_head(self.model.norm(x))

    def balance(self):
        """How unevenly the experts were used in the last batch; 1 is even."""
        return sum(layer.moe.balance for layer in self.model.layers if hasattr(layer, "moe"))
