"""zen-turbo: open-weight language models at contexts up to one million tokens, on ordinary machines.

The public face is these names; everything else may change. They load on first use, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zen_turbo.config import EngineConfig
    from zen_turbo.engine.request import SamplingParams
    from zen_turbo.errors import ZenTurboError
    from zen_turbo.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "ZenTurboError", "__version__"]

_HOMES = {
    "LLM": "zen_turbo.llm",
    "EngineConfig": "zen_turbo.config",
    "SamplingParams": "zen_turbo.engine.request",
    "ZenTurboError": "zen_turbo.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
