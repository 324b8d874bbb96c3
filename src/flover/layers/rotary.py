"""Rotary position embedding (Su et al. 2021) and its scalings: linear, dynamic NTK, llama3.

Tables are made in fp32 from absolute positions. Dynamic scaling depends on a length: transformers takes that
of the tokens seen so far in the call; here it is max(prompt length, position + 1) per token, which is the
same for a prompt in one piece and stays the same for chunks, neighbours and recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flover.layers.base import Layer

# rope types and the settings each one needs
SCALINGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    """rope settings of a config.json: `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta`.

    Raises:
        ValueError: an unknown scaling (lists the known ones); a setting it lacks or that is no number.
    """
    params = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    params.setdefault("rope_theta", hf.get("rope_theta") or hf.get("rotary_emb_base") or 10000.0)
    kind = params.pop("type", None)
    params.setdefault("rope_type", kind or "default")
    if params["rope_type"] not in SCALINGS:
        raise ValueError(f"rope scaling {params['rope_type']!r} is not supported; known: {', '.join(SCALINGS)}")
    for name in ("rope_theta", *SCALINGS[params["rope_type"]]):
        value = params.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"rope setting {name} must be a positive number, got {value!r}")
    return params


class RotaryTables(NamedTuple):
    """What a step's tokens are rotated by: cos and sin, each `[num_tokens, 1, rotary_dim / 2]`."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


class Rotary(Layer):
    """The tables that rotate the first `rotary_dim` of each head.

    interleaved: pairs are (0, 1), (2, 3), ... (GPT-J) instead of (i, i + rotary_dim / 2) (NeoX, LLaMA).
    max_position: the length the model was trained on, where dynamic scaling starts.
    """

    def __init__(
        self, rotary_dim: int, params: Mapping[str, Any], max_position: int, interleaved: bool = False
    ) -> None:
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"the rotary dimension must be even and positive, got {rotary_dim}")
        self.rotary_dim, self.interleaved = rotary_dim, interleaved
        self.theta = float(params["rope_theta"])
        self.kind = str(params["rope_type"])
        self.factor = float(params.get("factor", 1.0))
        self.trained = int(params["original_max_position_embeddings"]) if self.kind == "llama3" else max_position
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", self._inverse_frequencies(params), persistent=False)

    def _inverse_frequencies(self, params: Mapping[str, Any]) -> Tensor:
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim
        inv_freq = 1.0 / self.theta**exponent
        if self.kind == "linear":
            inv_freq = inv_freq / self.factor
        elif self.kind == "llama3":  # Llama 3.1: long wavelengths are scaled, short ones kept, a smooth ramp between
            low, high = float(params["low_freq_factor"]), float(params["high_freq_factor"])
            wavelength = 2 * math.pi / inv_freq
            smooth = (self.trained / wavelength - low) / (high - low)
            ramp = (1 - smooth) * inv_freq / self.factor + smooth * inv_freq
            inv_freq = torch.where(wavelength > self.trained / low, inv_freq / self.factor, inv_freq)
            middle = (wavelength <= self.trained / low) & (wavelength >= self.trained / high)
            inv_freq = torch.where(middle, ramp, inv_freq)
        return inv_freq

    def tables(self, positions: Tensor, prompt_lens: Tensor, dtype: torch.dtype) -> RotaryTables:
        """Made once a step and shared by all layers."""
        if self.kind != "dynamic":
            cos, sin = self.ops.rotary_tables(positions, self.inv_freq, dtype)
            return RotaryTables(cos, sin, self.interleaved)
        length = torch.maximum(prompt_lens, positions + 1)[:, None]
        inv_freq = torch.where(length > self.trained, self._stretched(length), self.inv_freq)
        angles = (positions.float()[:, None] * inv_freq)[:, None, :]
        return RotaryTables(angles.cos().to(dtype), angles.sin().to(dtype), self.interleaved)

    def _stretched(self, length: Tensor) -> Tensor:
        """Dynamic NTK frequencies `[num_tokens, rotary_dim / 2]`.

        In fp64 through exp and log: torch's `pow` gives other bits at the end of a buffer than inside it.
        """
        stretch = (self.factor * length.double() / self.trained - (self.factor - 1)).clamp(min=1.0)
        log_base = math.log(self.theta) + stretch.log() * (self.rotary_dim / (self.rotary_dim - 2))
        exponent = torch.arange(0, self.rotary_dim, 2, device=length.device).double() / self.rotary_dim
        return torch.exp(-exponent * log_base).float()
