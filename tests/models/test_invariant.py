"""Batch-invariant mode (docs/architecture.md, statement b): a token's logits are the same bits in any company."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import Checkpoint, Driver, random_prompts, threads, uneven
from torch import Tensor

from flover.kernels.reference.invariant import ROW_TILE, tiled_linear, tiled_map
from flover.layers.activation import ACTIVATIONS
from flover.model_config import ModelConfig
from flover.models.loader import load_model

Get = Callable[[str], Checkpoint]
FAMILIES = [
    "llama-gqa",
    "llama-rope-dynamic",
    "mistral-window",
    "gemma2",
    "gpt2",
    "gptj",
    "neox",
    "opt",
    "bloom-6-heads",
]


def alone_fused_chunked(module: Any, config: ModelConfig, lengths: list[int]) -> list[list[Tensor]]:
    """Per way of running them, the logits of each prompt at each of its positions."""
    prompts = random_prompts(config.vocab_size, lengths, seed=len(lengths))

    def run(prompts: list[list[int]], layout: str, chunk: Callable[[int], int] | None = None) -> list[Tensor]:
        return Driver(module, config, prompts, layout, batch_invariant=True).prefill(chunk)

    return [
        [run([p], "slab")[0] for p in prompts],
        run(prompts, "paged"),
        run(prompts, "paged", uneven(1)),
        run(prompts, "slab", lambda left: 1 if left < 12 else 9),  # ends as decode does
    ]


@pytest.mark.parametrize(("name", "num_threads"), [*((name, 1) for name in FAMILIES), ("llama-gqa", 2), ("gpt2", 2)])
def test_same_bits_alone_fused_and_chunked(checkpoint: Get, name: str, num_threads: int) -> None:
    ckpt = checkpoint(name)
    module = ckpt.load(batch_invariant=True)
    with threads(num_threads):
        ways = alone_fused_chunked(module, ckpt.config, [40, 17, 1, 16])
    for i, way in itertools.product(range(4), ways[1:]):
        assert torch.equal(way[i], ways[0][i])
    expected = ckpt.hf_logits(random_prompts(ckpt.config.vocab_size, [40, 17, 1, 16], seed=4)[0])
    assert (ways[0][0] - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "inner", "vocab"),
    [(36, 3, 1, 53, 101), (36, 2, 2, 7, 33), (66, 3, 3, 129, 257), (64, 4, 2, 1003, 1001), (96, 6, 2, 256, 512)],
)
def test_odd_shapes(
    checkpoint: Get, hidden: int, heads: int, kv_heads: int, inner: int, vocab: int, num_threads: int
) -> None:
    hf = {
        **checkpoint("llama-gqa").config.hf,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
    }
    config = ModelConfig.from_dict(hf)
    module = load_model(
        "", config, dtype=torch.float32, device="cpu", batch_invariant=True, load_format="dummy", seed=hidden
    )
    for parameter in module.parameters():
        parameter.mul_(8.0)  # dummy weights are small; let silu and softmax leave their linear range
    with threads(num_threads):
        ways = alone_fused_chunked(module, config, [33, 60, 5])
    for i, way in itertools.product(range(3), ways[1:]):
        assert torch.equal(way[i], ways[0][i])


def test_default_mode_is_not_invariant_in_general() -> None:
    """If this fails, torch has become position-independent by itself and `tiled_map` can go."""
    x = torch.randn(65, 1001, generator=torch.Generator().manual_seed(0)) * 3
    rows = torch.cat([torch.nn.functional.silu(row.clone()) for row in x.split(1)])
    assert not torch.equal(torch.nn.functional.silu(x), rows)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("num_threads", [1, 2])
def test_activation_in_any_place(name: str, num_threads: int) -> None:
    function = ACTIVATIONS[name]
    with threads(num_threads):
        for rows, width in ((1, 36), (3, 101), (65, 1001), (9, 10007)):
            x = torch.randn(rows, width) * 3
            whole = tiled_map(function, x)
            assert torch.equal(whole, torch.cat([tiled_map(function, row) for row in x.split(1)]))
            assert torch.equal(whole, tiled_map(function, torch.cat((x[:1], x)))[1:])
            torch.testing.assert_close(whole, function(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_linear_row_in_any_place(dtype: torch.dtype, num_threads: int) -> None:
    with threads(num_threads):
        for inner, outer in ((36, 101), (33, 257), (33, 7), (50, 48), (768, 1001)):
            x, weight, bias = (torch.randn(s).to(dtype) for s in ((2 * ROW_TILE + 3, inner), (outer, inner), (outer,)))
            whole = tiled_linear(x, weight, bias)
            for start in range(0, len(x), 5):
                assert torch.equal(tiled_linear(x[start : start + 7], weight, bias), whole[start : start + 7])


def test_modes_agree(checkpoint: Get) -> None:
    ckpt = checkpoint("llama-gqa")
    prompts = random_prompts(ckpt.config.vocab_size, [30])
    fast = Driver(ckpt.load(), ckpt.config, prompts, "slab").prefill()[0]
    same = Driver(ckpt.load(batch_invariant=True), ckpt.config, prompts, "slab", batch_invariant=True).prefill()[0]
    assert (fast - same).abs().max() <= 1e-4 * fast.std()
