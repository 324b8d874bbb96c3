"""The cost model: known times, what tensor and pipeline parallelism may and may not change, refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flover.cli import main
from flover.cluster.cost import Cost
from flover.cluster.hardware import DEVICES, Efficiency, device
from flover.cluster.model import model_cost
from flover.config import EngineConfig

LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "llama3-8b"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA3))
    return path


def cost(folder: Path, tp: int = 1, pp: int = 1, name: str = "h200", **options: Any) -> Cost:
    return Cost(model_cost(EngineConfig(str(folder), **options))[1], DEVICES[name], tp, pp)


def test_weights_are_those_of_the_engine(folder: Path) -> None:
    model = cost(folder).model
    assert 32 * model.layer.parameters + model.head.parameters == 7_504_924_672  # as measured: benchmarks/results
    assert cost(folder).memory().kv_token == 131_072
    assert cost(folder, kv_cache_dtype="fp8").memory().kv_token == 65_536


@pytest.mark.parametrize(("rows", "context", "ms"), [(1, 264, 4.208), (32, 264, 4.755), (128, 672, 7.787)])
def test_measured_steps(folder: Path, rows: int, context: int, ms: float) -> None:
    assert cost(folder).decode(rows, context) * 1e3 == pytest.approx(ms, rel=0.1)


def test_without_losses_a_step_is_its_bytes(folder: Path) -> None:
    ideal = Efficiency(1, 1, 1, 50, 0, 0, 0, 1, 1)
    model = cost(folder).model
    one = Cost(model, replace(DEVICES["h200"], efficiency=ideal))
    read = 32 * model.layer.num_bytes + model.head.num_bytes + 100 * 131_072
    assert one.decode(1, 100) == pytest.approx(read / 4.8e12, rel=1e-6)


def test_ranks_divide_the_work_and_add_the_links(folder: Path) -> None:
    one, two, eight = (cost(folder, n) for n in (1, 2, 8))
    assert one.decode(32, 1000) > two.decode(32, 1000) > one.decode(32, 1000) / 2
    assert eight.decode(1, 100) > two.decode(1, 100) * 0.6  # links and launches do not shrink
    assert two.all_reduce(0) == 2.1e-6
    assert two.all_reduce(1 << 30) == pytest.approx((1 << 30) / 360e9, rel=0.01)
    assert eight.all_reduce(1 << 30) == pytest.approx(2 * 7 / 8 * (1 << 30) / 360e9, rel=0.01)
    assert cost(folder, 8).memory().kv_token == 131_072 / 8
    assert cost(folder, 16).memory().kv_token == 131_072 / 8  # a KV head cannot be divided


def test_stages_share_the_weights_not_the_latency(folder: Path) -> None:
    one, four = cost(folder), cost(folder, pp=4)
    assert four.memory().weights < one.memory().weights / 3
    assert four.decode(4, 1000) > one.decode(1, 1000)
    assert four.prefill(8000) < one.prefill(8000)  # its chunks follow each other
    assert four.prefill(1000) > one.prefill(1000)  # a single one cannot


def test_sizes_that_do_not_divide(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 .* 1, 2, 4, 8, 16, 32 would work"):
        cost(folder, 3)
    with pytest.raises(ValueError, match="pp=33 is more than the 32 layers"):
        cost(folder, pp=33)


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    text = """
memory_bytes = 24e9
bandwidth = 1e12
per_node = 2
flops = { bfloat16 = 165e12 }
node = { latency = 2e-5, hop = 1e-5, bandwidth = 25e9 }
network = { latency = 5e-5, hop = 1e-5, bandwidth = 1e9 }
"""
    path = tmp_path / "mine.json"
    values = {"memory_bytes": 24e9, "bandwidth": 1e12, "per_node": 2, "flops": {"bfloat16": 165e12}}
    values["node"] = {"latency": 2e-5, "hop": 1e-5, "bandwidth": 25e9}
    values["network"] = {"latency": 5e-5, "hop": 1e-5, "bandwidth": 1e9}
    path.write_text(json.dumps(values))
    mine = device(str(path))
    assert mine.name == "mine"
    pytest.importorskip("tomllib")
    toml = tmp_path / "mine.toml"
    toml.write_text(text)
    assert device(str(toml)) == mine
    for line, wrong in (
        ("speed = 1", "unknown .'speed'.; known are name"),
        ("efficiency = { weights = 2 }", r"mine.toml: .efficiency.: weights must be at most 1, got 2"),
        ("memory_bytes = 1", "Cannot overwrite a value"),
    ):
        toml.write_text(text + line)
        with pytest.raises(ValueError, match=wrong):
            device(str(toml))
    for part, name, value, wrong in (
        ("flops", "bfloat16", 0, "flops bfloat16 must be a number above 0, got 0"),
        ("flops", "bfloat16", "fast", "flops bfloat16 must be a number above 0, got 'fast'"),
        ("node", "bandwidth", 0, r"\[node\]: bandwidth must be a number above 0, got 0"),
        ("network", "latency", -1, r"\[network\]: latency must be a number of at least 0, got -1"),
        ("efficiency", "softness", 0, r"\[efficiency\]: softness must be a number above 0, got 0"),
        ("efficiency", "layer", None, r"\[efficiency\]: layer must be a number of at least 0, got None"),
    ):
        path.write_text(json.dumps({**values, part: {**values.get(part, {}), name: value}}))  # type: ignore[dict-item]
        with pytest.raises(ValueError, match=wrong):
            device(str(path))
    for text, wrong in (
        ("[1]", r"mine.json: a card is an object of values, not \[1\]"),
        (json.dumps({**values, "memory_bytes": float("nan")}), "memory_bytes must be a number above 0, got nan"),
        (json.dumps({**values, "bandwidth": 10**400}), "bandwidth must be a number above 0, got 1000"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=wrong):
            device(str(path))
    with pytest.raises(ValueError, match="hardware must be h200, h100, a100 or a .toml or .json file, got 'h300'"):
        device("h300")


def test_plan_prints_what_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--hardware", "h100", "--tp", "2", "--replicas", "4"]) == 0
    out = capsys.readouterr().out
    assert "tp 2 x pp 1 = 2 x h100" in out
    assert "4 replicas" in out
    small = folder.parent / "small.json"
    card = {"memory_bytes": 10e9, "bandwidth": 1e12, "per_node": 8, "flops": {"bfloat16": 1e14}}
    link = {"latency": 1e-5, "hop": 1e-6, "bandwidth": 1e10}
    small.write_text(json.dumps({**card, "node": link, "network": link}))
    assert main(["plan", str(folder), "--hardware", str(small)]) == 2
    said = capsys.readouterr()
    assert "too small: tp=2 would fit" in said.err
    assert "too much" in said.out
    assert main(["plan", str(folder), "--replicas", "2"]) == 2
    assert "needs --hardware" in capsys.readouterr().err
    assert main(["plan", "--hardware", "h200"]) == 0
    assert re.search(r"TTFT, ms( +0\.\d*[1-9]\d*)+ *\n", capsys.readouterr().out), "of a small model, too, not 0"
