"""Qwen 2 and 2.5 (Yang et al. 2024): LLaMA with biases on q, k and v; upper layers may have a window."""

from __future__ import annotations

from flover.model_config import ModelConfig
from flover.models.llama import LlamaAttention, LlamaBlock, LlamaForCausalLM


class Qwen2Attention(LlamaAttention):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, qkv_bias=True, out_bias=False)


class Qwen2Block(LlamaBlock):
    attention = Qwen2Attention


class Qwen2ForCausalLM(LlamaForCausalLM):
    block = Qwen2Block
