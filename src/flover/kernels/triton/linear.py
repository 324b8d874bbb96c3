"""Linear layers: cuBLAS, except where it leaves bandwidth unused or a row's bits must not depend on other rows.

At few rows a product is a stream of its weight; product.py holds the kernels for that, wide.py the one for gate and up
of some more. The choice was measured (docs/performance.md): cuBLAS keeps many rows, an output head, and what no tiling
cuts so that it just fills the GPU.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flover.kernels.triton.fused import activation, gated
from flover.kernels.triton.product import HALF, End, Tiling, _launch, _launch_invariant, _launch_one, block_m
from flover.kernels.triton.wide import cut_for, gated_wide

MAX_ROWS = 64  # tokens in one tile; more than that are cuBLAS's
DEEP_ROWS = range(MAX_ROWS + 1, 113)  # of a weight with many inputs for its outputs, by cuBLASLt
MAX_FEATURES = 65536  # cuBLAS streams an output head as fast as there is memory


@cache
def tiling(rows: int, out_features: int, in_features: int, num_sms: int) -> Tiling | None:
    """How to cut a product of few rows so that its programs just fill the GPU; None: leave it to cuBLAS.

    Measured on an H200 (docs/performance.md). What counts is how many tiles of 64 features there are for each
    multiprocessor: about one, or many, fill it as they are; half of one are split along the inner dimension; a little
    more than one stay small enough to lie side by side, so that there is no second round. An output head is cuBLAS's.
    """
    if rows > MAX_ROWS or out_features > MAX_FEATURES or in_features < 1024:
        return None
    tiles, few = out_features // 64, rows <= 32
    fill = tiles / num_sms
    stages = 6 if few else 5
    if fill <= 0.5:
        chosen = Tiling(64, 128, 2 if fill >= 1 / 3 else 4, stages, 4)
    elif rows == 1:  # has a kernel of its own
        chosen = Tiling(64, 128, 1, stages, 4)
    elif 0.7 < fill <= 0.75:  # 6144 x 4096: no faster than cuBLAS, but what comes after it can begin early
        if rows <= 16:
            chosen = Tiling(64, 64, 4, stages, 4)
        else:
            chosen = Tiling(32, 256, 1, 4, 4) if few else Tiling(64, 128, 1, stages, 4)
    elif not few:
        if fill < 4 / 3:
            return None
        chosen = Tiling(128, 64, 1, stages, 4)
    elif fill <= 0.7:
        chosen = Tiling(128, 128, 3, 4, 4)
    elif 1 < fill < 1.5:
        chosen = Tiling(64, 64, 2, 4, 4) if fill < 4 / 3 and rows <= 16 else Tiling(64, 64, 1, stages, 4)
    else:  # of many tiles with more than 16 tokens, two fit a multiprocessor
        chosen = Tiling(64, 128, 1, 4 if fill > 3 and rows > 16 else stages, 4)
    if out_features % chosen.block_n or in_features % (chosen.block_k * chosen.split_k):
        return None
    return chosen if tiles * chosen.split_k >= 0.7 * num_sms else None


def _tiling_for(x: Tensor, weight: Tensor) -> Tiling | None:
    if x.dtype not in HALF:
        return None
    return tiling(x.shape[0], *weight.shape, torch.cuda.get_device_properties(x.device).multi_processor_count)


def _few(x: Tensor, weight: Tensor, bias: Tensor | None, end: End) -> Tensor | None:
    """The kernels of product.py, None where cuBLAS is as fast."""
    chosen = _tiling_for(x, weight)
    split = chosen is not None and chosen.split_k > 1
    if x.shape[0] == 1 and len(weight) <= MAX_FEATURES and x.dtype in HALF and not split:
        return _launch_one(x, weight, bias, end)
    return None if chosen is None else _launch(x, weight, bias, block_m(x.shape[0]), chosen, end)


def _library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """cuBLAS. Of a number of features that is no multiple of 8 (GPT-2's 50,257 tokens) it has only slow kernels, for
    results whose rows lie off 16 bytes: there the rows lie apart, and the last few features are a product of their own.
    """
    features, rest = len(weight), len(weight) % 8
    if x.dtype not in HALF or bias is not None:
        return F.linear(x, weight, bias)
    if rest == 0:
        deep = len(x) in DEEP_ROWS and weight.shape[1] >= 2 * features
        return F.linear(x, weight, _no_bias(features, x.dtype, x.device) if deep else None)
    out = torch.empty(len(x), features + 8 - rest, dtype=x.dtype, device=x.device)[:, :features]
    for part in (slice(features - rest), slice(features - rest, features)):
        torch.mm(x, weight[part].t(), out=out[:, part])
    return out


@cache
def _no_bias(features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. Products with a bias PyTorch gives to cuBLASLt, which cuts those of a deep weight better.

    Made before a graph is captured, as the runner launches every shape once, and there when any stream reads it.
    """
    return torch.zeros(features, dtype=dtype).to(device)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    act: str = "",
    add: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`act(x @ weight.T + bias) + add`; x `[num_tokens, in]`, weight `[out, in]`.

    batch_invariant: one tiling whatever the number of tokens, which sums in the same order for every row.
    """
    out = None if batch_invariant else _few(x, weight, bias, End(act=act, add=add))
    if out is not None:
        return out
    out = _launch_invariant(x, weight, bias) if batch_invariant else _library(x, weight, bias)
    out = activation(out, act) if act else out
    return out if add is None else out + add


def forked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, fork: int, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """Two layers that read the same tokens, the second with a bias and an activation, from features `fork` on."""
    out = None if batch_invariant else _few(x, weight, bias, End(act=act, fork=fork))
    if out is not None:
        return out[:, :fork], out[:, fork:]
    first = linear(x, weight[:fork], None, batch_invariant=batch_invariant)
    return first, linear(x, weight[fork:], bias, act=act, batch_invariant=batch_invariant)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str, *, batch_invariant: bool = False) -> Tensor:
    """act(x @ gate.T) * (x @ up.T), weight = gate over up; few rows, and very many, in one launch."""
    if bias is None and not batch_invariant and (cut := cut_for(x, weight)):
        return gated_wide(x, weight, name, cut)
    chosen = None if batch_invariant else _tiling_for(x, weight)
    if x.shape[0] == 1 and chosen is not None:
        return _launch_one(x, weight, bias, End(name))
    if chosen is None or chosen.split_k > 1 or chosen.block_n < 64 or weight.shape[0] % 128:
        out: Tensor = gated(linear(x, weight, bias, batch_invariant=batch_invariant), name)
        return out
    if x.shape[0] <= 32 and x.shape[1] % 128 == 0:  # a whole tile of each fits
        chosen = Tiling(64, 128, 1, 4, 4)
    else:
        chosen = chosen._replace(block_n=chosen.block_n // 2)
    return _launch(x, weight, bias, block_m(x.shape[0]), chosen, End(name))
