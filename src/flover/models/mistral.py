"""Mistral 7B (Jiang et al. 2023): LLaMA with a sliding window, which comes with the config."""

from __future__ import annotations

from flover.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    pass
