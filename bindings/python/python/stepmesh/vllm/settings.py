"""The connector's settings, from the plugin's ``connector_extra_config`` or the draft's ``afd_extra_config``."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Mapping

from ..errors import InvalidArgument


@dataclass(frozen=True)
class Settings:
    """All are optional but for what vLLM's own configuration does not say."""

    #: ``shm`` on one host, ``tcp``, ``verbs``; by default shm if the host is a loopback address, else tcp.
    transport: str | None = None
    token: str | None = None
    insecure: bool = False
    #: This host's address for tcp.
    address: str | None = None
    devices: tuple[str, ...] = ()
    lanes: int = 1
    spin_us: int = 0
    progress: str | None = None
    #: The GPU that the slots are on: a number, or true for the worker's own. By default they are in host memory. With it,
    #: transfers can be captured in CUDA graphs.
    gpu: int | bool | None = None
    #: Most graphs that are captured.
    graphs: int = 256
    #: Microbatches in flight, any number.
    num_stages: int | None = None
    #: Most tokens of one attention instance in one transfer.
    max_tokens: int | None = None
    hidden_size: int | None = None
    #: Most bytes of an element of the hidden state.
    element_bytes: int = 2
    #: Columns of the router logits, of at most four bytes; zero where the router is on the FFN side.
    router_columns: int | None = None
    #: ``paired``: attention rank a is answered by FFN rank a modulo their number. ``sum``: every FFN instance answers with a
    #: partial sum.
    reduce: str | None = None
    #: Sends the plugin's DP metadata in band, for runners that ask for it.
    control_plane: bool = True
    #: What ``recv_attn_output`` returns: ``torch`` or ``numpy``; by default PyTorch where it is installed.
    tensors: str | None = None
    timeout: float = 600.0

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any] | None) -> "Settings":
        raw = dict(raw or {})
        raw.pop("afd_size", None)
        known = {field.name for field in fields(cls)}
        for name in raw:
            if name not in known:
                raise InvalidArgument(f"connector_extra_config: {name!r} is unknown: {', '.join(sorted(known))}")
        if "devices" in raw:
            raw["devices"] = tuple(raw["devices"])
        settings = cls(**raw)
        if settings.gpu is False:
            settings = replace(settings, gpu=None)
        if settings.graphs < 1:
            raise InvalidArgument(f"graphs: {settings.graphs}: one at least")
        if settings.reduce not in (None, "paired", "sum"):
            raise InvalidArgument(f"reduce: {settings.reduce!r}: paired or sum")
        return settings

    def to_mapping(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "token"}


def first(source: Any, *paths: str) -> Any:
    """The first of these dotted attributes that is there."""
    for path in paths:
        value = source
        for name in path.split("."):
            value = getattr(value, name, None)
            if value is None:
                break
        if value is not None and not callable(value):
            return value
    return None


def sizes(config: Any) -> tuple[int, int]:
    """Attention and FFN instances, from the plugin's configuration or the draft's."""
    attention = first(config, "num_attention_ranks", "num_attention_servers")
    ffn = first(config, "num_ffn_ranks", "num_ffn_servers")
    named = (first(config, "afd_extra_config") or {}).get("afd_size")
    if named is not None:
        match = re.fullmatch(r"(\d+)A(\d+)F", str(named))
        if match is None:
            raise InvalidArgument(f"afd_size: {named!r}: such as 2A2F")
        attention, ffn = int(match[1]), int(match[2])
    if not attention or not ffn:
        raise InvalidArgument("the AFD configuration says neither how many attention nor how many FFN instances there are")
    return int(attention), int(ffn)
