"""Every family against transformers (eager, fp32): logits everywhere, chunks, layouts, greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import CASES, Checkpoint, Driver, random_prompts, reference, uneven
from torch import Tensor

from flover.kernels.reference import fused
from flover.layers.attention import alibi_slopes
from flover.models.registry import ARCHITECTURES

LENGTHS = [23, 1, 10]
ONE_EACH = [
    "llama-gqa",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt2",
    "gptj",
    "neox",
    "opt",
    "bloom-6-heads",
]
ROTARY = [name for name in ONE_EACH if name.split("-")[0] not in ("gpt2", "opt", "bloom")]
Get = Callable[[str], Checkpoint]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the spread of the logits, everywhere."""
    spread = theirs.std().item()
    assert spread >= 1.0, f"logits with a spread of {spread} prove little"
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    worst = (ours - theirs).abs().max().item()
    assert worst <= 1e-4 * spread, f"{worst / spread:.2e} of the spread"


def test_every_architecture_has_a_case() -> None:
    tested = {f"{c.family}LMHeadModel" if c.family == "GPT2" else f"{c.family}ForCausalLM" for c in CASES.values()}
    assert tested == set(ARCHITECTURES) - {"EchoModel"}


@pytest.mark.parametrize("name", CASES)
def test_logits(checkpoint: Get, name: str) -> None:
    """Rows alone and packed, in one piece and in uneven chunks, in a slab and in shuffled blocks."""
    ckpt = checkpoint(name)
    module, config = ckpt.load(), ckpt.config
    prompts = random_prompts(config.vocab_size, LENGTHS)
    expected = [ckpt.hf_logits(p) for p in prompts]
    for layout in ("slab", "paged"):
        alone = Driver(module, config, prompts[:1], layout).prefill()
        assert_close(alone[0], expected[0])
        assert_close(torch.cat(Driver(module, config, prompts, layout).prefill()), torch.cat(expected))
        chunked = Driver(module, config, prompts, layout).prefill(uneven())
        assert_close(torch.cat(chunked), torch.cat(expected))


@pytest.mark.parametrize("name", CASES)
def test_greedy(checkpoint: Get, name: str) -> None:
    ckpt = checkpoint(name)
    prompts = random_prompts(ckpt.config.vocab_size, LENGTHS[:2], seed=1)
    expected = [ckpt.hf_greedy(p, 12) for p in prompts]
    module = ckpt.load()
    assert Driver(module, ckpt.config, prompts, "paged").greedy(12) == expected
    assert Driver(module, ckpt.config, prompts[:1], "slab").greedy(12) == expected[:1]


@pytest.mark.parametrize("name", ONE_EACH)
def test_float64_is_much_closer(checkpoint: Get, name: str) -> None:
    """In fp64 all layouts and chunkings agree to 1e-10 of the spread (docs/architecture.md, statement c)."""
    ckpt = checkpoint(name)
    module = ckpt.load(dtype=torch.float64)
    prompts = random_prompts(ckpt.config.vocab_size, LENGTHS, seed=2)
    whole = [Driver(module, ckpt.config, [p], "slab").prefill()[0] for p in prompts]
    chunked = Driver(module, ckpt.config, prompts, "paged").prefill(uneven(3))
    for a, b in zip(whole, chunked):
        assert a.dtype == torch.float64
        assert (a - b).abs().max() <= 1e-10 * a.std()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gpt2", "bloom", "mistral-window"])
def test_half_precision(checkpoint: Get, name: str, dtype: torch.dtype) -> None:
    """Half precision strays from the fp32 logits about as much as transformers' own does."""
    ckpt = checkpoint(name)
    prompt = random_prompts(ckpt.config.vocab_size, [23])
    exact = ckpt.hf_logits(prompt[0])
    ours = Driver(ckpt.load(dtype=dtype), ckpt.config, prompt, "paged").prefill(uneven())[0]
    theirs = Checkpoint(ckpt.case, ckpt.folder, reference(ckpt.folder, dtype)).hf_logits(prompt[0])
    assert ours.dtype == dtype
    assert (ours - exact).std() <= 2 * (theirs - exact).std()


# ---- mutations: the comparison above must notice each of these


@pytest.mark.parametrize("name", ONE_EACH)
def test_notices_swapped_kv_heads(checkpoint: Get, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fused.store_kv
    monkeypatch.setattr(fused, "store_kv", lambda k, v, *rest: store(k.flip(1), v.flip(1), *rest))
    _must_fail(checkpoint(name))


@pytest.mark.parametrize("name", [n for n in ONE_EACH if not n.startswith("bloom")])  # ALiBi reads no positions
def test_notices_positions_off_by_one(checkpoint: Get, name: str) -> None:
    _must_fail(checkpoint(name), shift=1)


@pytest.mark.parametrize("name", ROTARY)
def test_notices_a_doubled_rope_base(checkpoint: Get, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flover.layers.rotary import Rotary

    build = Rotary.__init__

    def doubled(self: Rotary, rotary_dim: int, params: Any, *rest: Any, **kwargs: Any) -> None:
        build(self, rotary_dim, {**params, "rope_theta": 2 * params["rope_theta"]}, *rest, **kwargs)

    monkeypatch.setattr(Rotary, "__init__", doubled)
    _must_fail(checkpoint(name))


def test_notices_wrong_alibi_slopes(checkpoint: Get) -> None:
    module = checkpoint("bloom-6-heads").load()
    for layer in module.layers:  # type: ignore[union-attr]
        layer.self_attn.attn.alibi_slopes.copy_(layer.self_attn.attn.alibi_slopes.flip(0))
    _must_fail(checkpoint("bloom-6-heads"), module=module)


def _must_fail(ckpt: Checkpoint, shift: int = 0, module: Any = None) -> None:
    prompts = random_prompts(ckpt.config.vocab_size, [23])
    driver = Driver(module or ckpt.load(), ckpt.config, prompts, "paged")
    driver.shift = shift
    logits = driver.prefill(lambda left: 7)
    with pytest.raises(AssertionError, match="of the spread"):
        assert_close(logits[0], ckpt.hf_logits(prompts[0]))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 7, 12, 16, 20, 32, 71, 112])
def test_alibi_slopes_are_transformers_own_bits(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    assert torch.equal(alibi_slopes(heads), _get_alibi_slopes(heads, torch.device("cpu")))
