"""Quantised engines on a GPU: the CPU's log-probabilities in fp32, equal bits alone and fused, steps without a wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gpu_engine import (
    check_bits_alone_and_fused,
    check_steady_steps_never_wait,
    compare,
    random_prompts,
    run,
)

from flover import LLM, SamplingParams
from flover.config import CHOICES

NAMES = [name for name in CHOICES["quantization"] if name != "none"]
FP8 = torch.cuda.get_device_capability() >= (8, 9)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    if "fp8" in request.param and not FP8:
        pytest.skip("needs a GPU with fp8")
    return str(request.param)


@pytest.mark.parametrize("model", ["kjv-llama", "kjv-gpt2"])
def test_fp32_against_the_cpu(model: str, name: str) -> None:
    """With tokens of 8 bits, one that rounds the other way on a GPU moves a logit by a share of its 8th bit."""
    prompts = random_prompts(500)
    settings: dict[str, Any] = {"quantization": name, "max_num_batched_tokens": 24}
    cpu, gpu = (run(model, prompts, device=device, **settings) for device in ("cpu", "cuda"))
    if "w8a8" not in name:
        return compare(cpu, gpu, 2)
    for a, b in zip(cpu, gpu):
        for x, y, p, q in zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs):
            if x != y:
                break
            assert abs(p[x].logprob - q[y].logprob) < 0.5
    assert sum(a.token_ids == b.token_ids for a, b in zip(cpu, gpu)) >= 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batch_invariant_is_bitwise(name: str, dtype: str) -> None:
    options: dict[str, Any] = {"dtype": dtype, "quantization": name, "max_num_seqs": 8, "max_num_batched_tokens": 24}
    prompts, params = random_prompts(500), SamplingParams(max_tokens=12, ignore_eos=True, logprobs=0, seed=1)
    with LLM("kjv-llama", device="cuda", batch_invariant=True, **options) as llm:
        check_bits_alone_and_fused(llm, prompts, [params] * len(prompts))


def test_bf16_graphs(name: str) -> None:
    """Many rows and few, captured; steps never wait for the device; the text is the unquantised model's at first."""
    texts = {}
    for quantization in ("none", name):
        with LLM("kjv-llama", device="cuda", dtype="bfloat16", quantization=quantization, max_num_seqs=320) as llm:
            greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
            out = llm.generate(["And God said", "The LORD is my"], greedy)
            texts[quantization] = [o.outputs[0].token_ids[:2] for o in out]
            many = llm.generate(["And God said"] * 300, greedy)
            assert all(len(o.outputs[0].token_ids) == 8 for o in many)
            check_steady_steps_never_wait(llm)
    assert texts["none"] == texts[name]
