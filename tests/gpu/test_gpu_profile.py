"""The anatomy of real decode steps: steps are told apart, products recognised, and the parts add up to the time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flover.anatomy import PRODUCT, STAGING
from flover.bound import Bound, Limits
from flover.config import EngineConfig
from flover.engine.engine import EngineCore
from flover.profile import profile_decode, profile_prefill

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("batch", [1, 7, 96])
def test_steps_of_a_gpu(tmp_path: Path, batch: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    core = EngineCore(EngineConfig(str(tmp_path), load_format="dummy", max_num_seqs=128))
    bound = Bound(core, Limits(3e12, 7e14))
    profile = profile_decode(core, bound, batch, 100, 20)
    found = profile.anatomy
    assert found.between_us is not None, "a step has one copy to the device"
    assert next(row for row in found.kernels if row.name.startswith(STAGING)).launches == 1
    products = [row for row in found.kernels if row.kind == PRODUCT and "reduce" not in row.name.lower()]
    assert sum(row.launches for row in products) == len(bound.products)
    assert all(row.tb_per_s is not None for row in products)
    assert found.span_us <= profile.step_ms * 1e3 * 1.5
    assert found.busy_us + found.gaps_us == pytest.approx(found.span_us)
    assert profile_prefill(core, bound, 500).anatomy.busy_us > 0
    core.shutdown()
