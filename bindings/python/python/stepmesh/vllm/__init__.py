"""vLLM's attention-FFN disaggregation over stepmesh: a connector for the AFD plugin, and for the draft before it.

``register`` makes it known to the plugin under the name ``StepMeshAFDConnector``; as an entry point of the group
``vllm.general_plugins`` vLLM calls it by itself. ``docs/integration.md`` says how to switch it on.
"""

from __future__ import annotations

from .connector import StepMeshAFDConnector
from .control import StepMeshAFDControlPlane
from .settings import Settings
from .transfer import A2FPayload, F2APayload, TransferContext, TransferMetadata

NAME = "StepMeshAFDConnector"


def register() -> bool:
    """Tells the AFD plugin of the connector; false where there is no plugin."""
    try:
        from afd_plugin import config
        from afd_plugin.connectors.factory import AFDConnectorFactory
    except ImportError:
        return False
    AFDConnectorFactory.register_connector(NAME, __name__, NAME, replace=True)
    if NAME not in config.SUPPORTED_AFD_CONNECTORS:
        # The plugin checks names against a list of its own.
        config.SUPPORTED_AFD_CONNECTORS = (*config.SUPPORTED_AFD_CONNECTORS, NAME)
    return True


__all__ = [
    "A2FPayload",
    "F2APayload",
    "Settings",
    "StepMeshAFDConnector",
    "StepMeshAFDControlPlane",
    "TransferContext",
    "TransferMetadata",
    "register",
]
