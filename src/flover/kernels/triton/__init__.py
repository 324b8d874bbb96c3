"""The GPU backend: Triton kernels, each with its specification in kernels/reference, under the same names."""

from flover.kernels.triton.attention import attention
from flover.kernels.triton.fused import activation, gated, layer_norm, rms_norm
from flover.kernels.triton.kv_cache import copy_blocks, poison_blocks
from flover.kernels.triton.linear import forked_linear, gated_linear, linear
from flover.kernels.triton.quantised import quantised_gated_linear, quantised_linear
from flover.kernels.triton.rotary import rotary_tables
from flover.kernels.triton.sampling import best_of_parts, draw, draw_part

__all__ = [
    "activation",
    "attention",
    "best_of_parts",
    "copy_blocks",
    "draw",
    "draw_part",
    "forked_linear",
    "gated",
    "gated_linear",
    "layer_norm",
    "linear",
    "poison_blocks",
    "quantised_gated_linear",
    "quantised_linear",
    "rms_norm",
    "rotary_tables",
]
