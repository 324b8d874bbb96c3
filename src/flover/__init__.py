"""Flover: temporal fusion of autoregressive decoding.

The names below are imported on first use, so that the torch-free modules stay torch-free.
"""

from __future__ import annotations

import os

if "OMP_WAIT_POLICY" not in os.environ:  # torch's threads spin between two products; where others want the cores too,
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # that is what a step waits for (docs/operations.md)

TYPE_CHECKING = False  # as typing's, without importing it: until `flover` has begun, Ctrl-C is a traceback
__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "flover.llm",
    "AsyncLLM": "flover.async_llm",
    "LLMEngine": "flover.engine.llm_engine",
    "SamplingParams": "flover.sampling_params",
    "EngineConfig": "flover.config",
    "RequestOutput": "flover.request",
    "CompletionOutput": "flover.request",
    "StructuredOutputsParams": "flover.structured",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from typing import Any

    from flover.async_llm import AsyncLLM as AsyncLLM
    from flover.config import EngineConfig as EngineConfig
    from flover.engine.llm_engine import LLMEngine as LLMEngine
    from flover.llm import LLM as LLM
    from flover.request import CompletionOutput as CompletionOutput
    from flover.request import RequestOutput as RequestOutput
    from flover.sampling_params import SamplingParams as SamplingParams
    from flover.structured import StructuredOutputsParams as StructuredOutputsParams


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'flover' has no attribute {name!r}")
