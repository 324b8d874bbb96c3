"""Architecture names, as config.json spells them, and where each family lives; imported when asked for."""

from __future__ import annotations

from importlib import import_module

import torch

from flover.config import ResolvedConfig
from flover.kernels.dispatch import backend_for
from flover.models.base import CausalLM

ARCHITECTURES = {
    "BloomForCausalLM": "bloom",
    "GPT2LMHeadModel": "gpt2",
    "GPTJForCausalLM": "gptj",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "OPTForCausalLM": "opt",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "EchoModel": "echo",
}


def model_class(architecture: str) -> type[CausalLM]:
    """The family's class.

    Raises:
        ValueError: an unknown architecture; lists the known ones.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(sorted(ARCHITECTURES))}")
    module = import_module(f"flover.models.{ARCHITECTURES[architecture]}")
    found: type[CausalLM] = getattr(module, architecture)
    return found


def backend_of(config: ResolvedConfig) -> str:
    """What computes a model with these settings (`kernels.dispatch`)."""
    device, dtype = torch.device(config.engine.device), getattr(torch, config.engine.dtype)
    only = getattr(model_class(config.model.architecture), "BACKEND", None)  # EchoModel has no kernels
    return only or backend_for(device, dtype, config.model.head_dim)
