"""EchoModel: no arithmetic that rounds, so addressing can be checked bitwise (statement a of docs/architecture.md).

It writes every token id and its position into K and V of each layer through `store_kv`, reads each row's whole history
back through the layout's own addressing, and its next token is an integer hash of all of it. Its tokens are equal in
every trace, layout, reorder mode, depth, chunking and policy, or an address is wrong. K and V hold different functions
of the token, so a cache that aliases them is seen too. An fp8 cache holds integers to 16 only: there each number is
written in digits of base 16. A rank writes its KV heads, and the ranks add up what they read before they hash it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flover.kernels.reference.kv_cache import FP8, store_kv
from flover.layers.attention import ForwardContext
from flover.layers.base import Layer
from flover.model_config import ModelConfig
from flover.models.base import CausalLM
from flover.parallel import Group
from flover.sharding import Part, kv_split, vocab_part

_MODULUS = 2_147_483_647  # products of two residues stay inside int64


class EchoModel(CausalLM, Layer):
    """head_dim >= 2. Logits are one-hot at the hash of the row's history."""

    BACKEND = "torch"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_layers, self.vocab_size = config.num_layers, config.vocab_size
        self.whole_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.kv_heads, self.replicas = config.num_kv_heads, 1
        self.ids = vocab_part(config.vocab_size, 0, 1)
        self.largest = max(config.vocab_size, config.max_position_embeddings) + config.num_layers

    def shard(self, group: Group) -> Mapping[str, Part]:
        first, end = kv_split(self.whole_kv_heads, group.rank, group.size)
        self.kv_heads, self.replicas = end - first, max(group.size // self.whole_kv_heads, 1)
        self.ids = vocab_part(self.vocab_size, group.rank, group.size)
        return super().shard(group)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """-> `[num_tokens, 1]` int64: the hash of each token's history up to itself."""
        dtype = ctx.k_cache[0].dtype
        hashes = torch.empty(len(input_ids), dtype=torch.int64, device=input_ids.device)
        for layer in range(self.num_layers):
            k = self._encode(input_ids + layer, positions, dtype)
            v = self._encode(positions + layer, input_ids + 1, dtype)
            store_kv(k, v, ctx.k_cache[layer], ctx.v_cache[layer], ctx.slot_mapping)
        for row in range(len(ctx.meta.seq_lens)):
            begin, end = ctx.meta.query_start[row], ctx.meta.query_start[row + 1]
            parts = [part for layer in range(self.num_layers) for part in ctx.history(layer, row, torch.float64)]
            # summed over the heads, so that one that differs shows
            history = self.group.all_reduce(torch.cat(parts, -1).sum(1)) / self.replicas
            hashes[begin:end] = self._hash(history)[begin - end :]
        return hashes[:, None]

    def _encode(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """Two integers `[num_tokens]` as `[num_tokens, kv_heads, head_dim]`, each in half of a head."""
        bits, half = 4 if dtype == FP8 else 24, self.head_dim // 2
        places = min(half, 60 // bits)
        if self.largest >> bits * places:
            raise ValueError(f"EchoModel: head_dim {self.head_dim} is too small for ids to {self.largest} in {dtype}")
        out = torch.zeros(len(a), self.kv_heads, self.head_dim, dtype=torch.float64, device=a.device)
        for i in range(places):
            digits = [value[:, None] >> bits * i & (1 << bits) - 1 for value in (a, b)]
            out[..., i], out[..., half + i] = digits
        return out.to(dtype)

    @staticmethod
    def _hash(history: Tensor) -> Tensor:
        """Running hash `[seq_len]` of `[seq_len, num_fields]`; a NaN changes every later value."""
        fields = torch.nan_to_num(history, nan=-12345.0).long()
        place = torch.arange(1, len(fields) + 1, device=fields.device)
        weights = torch.arange(1, fields.shape[1] + 1, device=fields.device) * 7_919 + 1_000_003
        mixed = (fields * weights).sum(-1) * (place * 2_654_435 % 1_000_033) % _MODULUS
        return torch.cumsum(mixed, 0) % _MODULUS

    def compute_logits(self, hidden: Tensor) -> Tensor:
        ids = torch.arange(self.ids.size, device=hidden.device) + self.ids.ranges[0][0]
        return (hidden % self.vocab_size == ids).float()
