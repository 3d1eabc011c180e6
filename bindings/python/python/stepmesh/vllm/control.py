"""The plugin's control plane in band: a microbatch more than there are stages carries its payloads as bytes."""

from __future__ import annotations

import json
from typing import Any

from ..errors import InvalidArgument

try:
    from afd_plugin.connectors.base import AFDControlPlane as _Base
    from afd_plugin.connectors.metadata import decode_control_payload, encode_control_payload
except ImportError:
    _Base = object

    def encode_control_payload(payload: Any) -> bytes:
        """Without the plugin, anything that JSON knows."""
        return json.dumps(payload).encode()

    def decode_control_payload(payload: bytes) -> Any:
        return json.loads(payload)


class StepMeshAFDControlPlane(_Base):
    """DP metadata from the attention side to the FFN side. Every attention instance sends; an FFN instance takes the one of
    the lowest rank once all have come."""

    def __init__(self, connector: Any) -> None:
        self._connector = connector
        self.payload: Any = None

    def update_state_from_dp_metadata(self, payload: Any) -> None:
        """Keeps it; transfers need none of it, since they say their rows themselves."""
        self.payload = payload

    def tokens(self, stage: int, ranks: int) -> list[int] | None:
        """Each attention rank's rows of a stage, as last announced; none where nothing was."""
        stages = getattr(self.payload, "dp_metadata_list", None) or {}
        counts = getattr(stages.get(stage), "num_tokens_across_dp_cpu", None)
        if counts is None:
            return None
        counts = [int(count) for count in counts]
        if not counts or ranks % len(counts) != 0:
            raise InvalidArgument(f"num_tokens_across_dp_cpu: {len(counts)} counts for {ranks} attention ranks")
        # The ranks of one tensor-parallel group have the same tokens.
        return [counts[rank * len(counts) // ranks] for rank in range(ranks)]

    def send_dp_metadata_list(self, payload: Any) -> None:
        self._connector.send_control(encode_control_payload(payload))

    def recv_dp_metadata_list(self) -> Any:
        return decode_control_payload(self._connector.receive_control())
