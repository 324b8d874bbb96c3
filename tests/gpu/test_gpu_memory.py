"""Memory on a GPU: weights that threads read arrive whole, and a slab gives back what finished requests held."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CASES, build

from flover import LLM, SamplingParams
from flover.kv import storage as storage_module
from flover.kv.virtual_memory import VirtualRange, load_driver
from flover.model_config import ModelConfig
from flover.models import checkpoint
from flover.models.loader import load_model

MIB = 1 << 20
LLAMA = {  # a slot of 2048 tokens is 4 MiB in each of 8 caches
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "dtype": "bfloat16",
}


# the driver counts the memory of the whole GPU, so nothing else may use it
alone = pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="needs the GPU for itself: run without -n")


def free_memory() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-sharded", "llama-bf16", "gpt2", "neox", "gptj"])
def test_loaded_weights_equal_those_on_a_cpu(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(CASES[name], tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    want = load_model(tmp_path, config, dtype=dtype, device="cpu").state_dict()
    for piece in (16 * MIB, 1024):  # whole tensors, and many turns of every buffer
        monkeypatch.setitem(checkpoint.PIECE, "cuda", piece)
        got = load_model(tmp_path, config, dtype=dtype, device="cuda").state_dict()
        assert list(got) == list(want)
        assert all(torch.equal(got[key].cpu(), want[key]) for key in want)


@alone
def test_a_range_is_mapped_and_given_back() -> None:
    driver = load_driver()
    torch.zeros(1, device="cuda")
    free = free_memory()
    memory = VirtualRange(1024 * MIB, 1000 * MIB, driver, torch.cuda.current_device())
    memory.resize(100 * MIB)
    data = torch.as_tensor(memory, device="cuda")
    assert data.data_ptr() == memory.address
    data[: memory.head] = 7
    data[memory.tail :] = 9
    small = free_memory()
    for _ in range(3):
        start, end = memory.resize(900 * MIB)
        data[start:end] = 8
        assert small - free_memory() >= 768 * MIB
        torch.cuda.synchronize()
        memory.resize(100 * MIB)
        assert abs(free_memory() - small) <= 4 * MIB
        assert bool((data[: memory.head] == 7).all())
        assert bool((data[memory.tail :] == 9).all())
    del memory
    assert free_memory() < free  # the tensor keeps it
    del data
    assert free - free_memory() <= 4 * MIB


Trace = tuple[dict[str, list[int]], list[int], list[int]]


def trace(folder: Path, **options: Any) -> Trace:
    """Tokens by request; mapped bytes and free memory after each step. 40 short and 8 long requests, 40 more later."""
    with LLM(
        str(folder),
        device="cuda",
        load_format="dummy",
        kv_layout="slab",
        max_num_seqs=64,
        max_model_len=2048,
        **options,
    ) as llm:
        engine, tokens = llm.engine, {}
        storage = engine.core._executor._runner.storage  # type: ignore[attr-defined]
        addresses = [cache.data_ptr() for cache in storage.k + storage.v]
        mapped, free = [], []

        def add(name: str, count: int, length: int) -> None:
            for i in range(count):
                params = SamplingParams(max_tokens=length + i % 5, ignore_eos=True, seed=i, temperature=0.8 * (i % 2))
                engine.add_request(f"{name}{i}", {"prompt_token_ids": [i + 1, 2, 3, i % 7]}, params)

        add("short", 40, 8)
        add("long", 8, 200)
        step = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
            if step == 80:
                add("late", 40, 30)
            mapped.append(sum(memory.head + memory.size - memory.tail for memory, _ in storage._ranges))
            free.append(free_memory())
        assert addresses == [cache.data_ptr() for cache in storage.k + storage.v]
    return tokens, mapped, free


@pytest.mark.parametrize("reorder", ["move", "indirect"])
def test_slab_releases_and_regrows_under_graphs(reorder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps with all memory kept give the same tokens, whatever was released and taken again meanwhile."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    tokens, mapped, free = trace(tmp_path, reorder=reorder)
    assert len(tokens) == 88
    low, high = min(mapped[40:80]), max(mapped[:20])
    assert high >= 48 * 32 * MIB
    assert low <= (16 + 1 + 4) * 32 * MIB  # 1.5 times 8 slots, scratch, and the ends of chunks
    assert max(free[40:80]) - min(free[:20]) >= 0.8 * (high - low)
    assert max(mapped[80:]) >= 48 * 32 * MIB
    make: Callable[..., Any] = storage_module.KVStorage.__init__

    def keep_all(self: Any, *arguments: Any) -> None:
        make(self, *arguments[:8])  # not elastic

    monkeypatch.setattr(storage_module.KVStorage, "__init__", keep_all)
    want, kept, _ = trace(tmp_path, reorder=reorder)
    assert len(set(kept)) == 1
    assert tokens == want


@alone
def test_memory_is_freed_with_the_engine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    left = []
    for _ in range(4):  # what is loaded once stays
        trace(tmp_path, reorder="move")
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream that an engine had: torch keeps them
        left.append(free_memory())
    assert left[1] - left[3] <= 64 * MIB


def test_the_memory_plan_holds(tmp_path: Path) -> None:
    """A heavy load stays within what was planned for weights, the largest step and the cache."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    settings: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "kv_cache_memory_bytes": 256 * MIB}
    with LLM(str(tmp_path), device="cuda", load_format="dummy", **settings) as llm:
        plan = llm.engine.core.resolved.memory
        prompts = [{"prompt_token_ids": [i % 500] * (20 + 3 * i)} for i in range(120)]
        params = [
            SamplingParams(max_tokens=12, ignore_eos=True, top_p=0.9, top_k=40, logprobs=5 * (i % 3), seed=i)
            for i in range(len(prompts))
        ]
        llm.generate(prompts, params)
        peak = torch.cuda.max_memory_reserved() - before
    assert plan.step > 0
    assert peak <= plan.weights + plan.step + plan.kv
