"""What one exchange is about, under the names that vLLM's runners use. Unlike the plugin's own, no length need be above
zero: a step without tokens is a transfer without rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TransferMetadata:
    """Layer, stage, and the tokens of each attention instance (on its own side: of itself)."""

    layer_idx: int
    stage_idx: int
    seq_lens: list[int]
    phase: str = "decoder"
    speculative_step: int = 0

    @property
    def total_tokens(self) -> int:
        return sum(self.seq_lens)

    def get_split_indices(self) -> list[int]:
        """Where each attention instance's tokens begin, but for the first."""
        ends, end = [], 0
        for length in self.seq_lens[:-1]:
            end += length
            ends.append(end)
        return ends

    def validate_tensor_shape(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 0 and shape[0] == self.total_tokens

    @classmethod
    def create_attention_metadata(cls, *, layer_idx: int, stage_idx: int, seq_len: int, **more: Any) -> "TransferMetadata":
        return cls(layer_idx, stage_idx, [seq_len], **more)

    @classmethod
    def create_ffn_metadata(
        cls, *, layer_idx: int, stage_idx: int, seq_lens: list[int], **more: Any
    ) -> "TransferMetadata":
        return cls(layer_idx, stage_idx, list(seq_lens), **more)


@dataclass
class TransferContext:
    """An exchange between its receive and its send; ``states`` is the connector's."""

    metadata: TransferMetadata
    states: Any = None


@dataclass
class A2FPayload:
    """What ``recv_attn_output`` returns. It can be taken apart: ``hidden_states, metadata = payload``."""

    hidden_states: Any
    context: TransferContext
    router_logits: Any = None
    input_ids: Any = None

    def __iter__(self) -> Any:
        return iter((self.hidden_states, self.context.metadata))


@dataclass
class F2APayload:
    """An output whose shared experts' part is apart."""

    routed_output: Any
    shared_output: Any = None
