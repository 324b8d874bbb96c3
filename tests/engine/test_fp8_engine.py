"""An fp8 KV cache end to end: addressing to the bit, the same tokens fused as serial, half the bytes, clear refusals.

K and V are rounded to three bits of mantissa, so a last bit of theirs can become a whole step of fp8: in fp32 two
orders of summing may part anywhere, and statement (c) is held in float64, where such a last bit is never seen.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, as_request, echo_core, echo_folder, prefix_equal, random_jobs, run
from test_fusion import LAYOUTS, SERIAL
from test_same_tokens import FUSED, make_requests, trace

from flover import LLM
from flover.config import EngineConfig, Hardware
from flover.engine.engine import EngineCore
from flover.model_config import ModelConfig
from flover.models.echo import EchoModel

FP8: dict[str, Any] = {"kv_cache_dtype": "fp8"}


def test_addressing_is_bitwise(echo: Path) -> None:
    """Statement (a): stores, copies, poison and reads of bytes, over every layout."""
    jobs = random_jobs(random.Random(7), 10)
    expected = run(echo_core(echo, **SERIAL, **FP8), jobs)
    for layout in LAYOUTS:
        core = echo_core(echo, max_num_batched_tokens=7, **layout, **FP8)
        assert core._executor._runner.storage.k[0].dtype == torch.float8_e4m3fn  # type: ignore[attr-defined]
        prefix_equal(expected, run(core, jobs), jobs)
        core.shutdown()


def test_echo_writes_digits_that_fp8_holds(echo: Path) -> None:
    model = EchoModel(ModelConfig.from_folder(echo))
    ids = torch.arange(200)
    written = model._encode(ids, 199 - ids, torch.float8_e4m3fn).double()[:, 0]
    assert torch.equal(written @ torch.tensor([1.0, 16.0, 0.0, 0.0], dtype=torch.float64), ids.double())
    assert torch.equal(written @ torch.tensor([0.0, 0.0, 1.0, 16.0], dtype=torch.float64), 199 - ids.double())


def test_echo_says_what_fp8_cannot_hold(tmp_path: Path) -> None:
    core = echo_core(echo_folder(tmp_path / "wide", vocab_size=300), **FP8)
    core.add(as_request(0, Job([1, 2, 3], 4)))
    (request,) = core.step().finished
    assert request.error is not None
    assert "head_dim 4 is too small" in request.error
    core.shutdown()


@pytest.mark.parametrize("model", ["kjv-llama", "kjv-gpt2"])
def test_tokens_are_equal_in_float64(model: str) -> None:
    options: dict[str, Any] = {"dtype": "float64", **FP8}
    serial = trace(model, make_requests(3, count=6), policy="serial", overlap_depth=0, **options)
    auto = trace(model, make_requests(3, count=6), dtype="float64")
    spread = [float((a - b).abs().max() / a.std()) for a, b in zip(auto.logits["r0"], serial.logits["r0"])]
    assert 1e-4 < spread[0] < 1.0  # it is another cache, and no worse than it should be
    preemptions = 0
    for choice in FUSED:
        fused = trace(model, make_requests(3, count=6), **options, **choice)
        preemptions += fused.preemptions
        assert fused.tokens == serial.tokens, choice
    assert preemptions > 0


def test_batch_invariant_logits_are_bit_equal() -> None:
    options: dict[str, Any] = {"batch_invariant": True, **FP8}
    serial = trace("kjv-llama", make_requests(3, count=4), policy="serial", overlap_depth=0, **options)
    for choice in (FUSED[1], FUSED[4]):
        fused = trace("kjv-llama", make_requests(3, count=4), **options, **choice)
        for name, rows in serial.logits.items():
            assert all(torch.equal(a, b) for a, b in zip(rows, fused.logits[name], strict=True)), (name, choice)


def test_memory_is_counted_in_bytes_of_fp8() -> None:
    size = {"kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 256, "device": "cpu"}
    cores = [EngineCore(EngineConfig("kjv-llama", **size, **options)) for options in ({}, FP8)]
    wide, narrow = (core.resolved.kv for core in cores)
    assert [next(s.value for s in core.resolved.settings if s.name == "kv_cache_dtype") for core in cores] == [
        "float32",
        "float8_e4m3fn",
    ]
    assert wide.bytes_per_token == 4 * narrow.bytes_per_token
    assert narrow.num_blocks == 4 * wide.num_blocks
    storage = cores[1]._executor._runner.storage  # type: ignore[attr-defined]
    held = sum(cache.numel() * cache.element_size() for cache in storage.k + storage.v)
    assert held == (narrow.num_blocks + 1) * narrow.block_size * narrow.bytes_per_token
    for core in cores:
        core.shutdown()


def test_a_gpu_too_old_for_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flover.engine import engine

    monkeypatch.setattr(engine, "detect_hardware", lambda _: Hardware("cuda", 8 << 30))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 6))
    with pytest.raises(ValueError, match=r"too old for fp8 .* kv_cache_dtype='auto' works$"):
        LLM("kjv-llama", dtype="float16", kv_cache_dtype="fp8")
