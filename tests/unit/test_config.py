"""Settings: every wrong value is a one-line error that says what would work; resolve decides the rest, once."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from flover.config import EngineConfig, Hardware
from flover.model_config import ModelConfig
from flover.resolve import resolve

GIB = 1 << 30
HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "eos_token_id": [1, 2],
}
TOKEN_BYTES = 2 * 16 * 8 * 64 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float64"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be one of auto, fp8, got 'int4'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
        ({"max_num_seqs": True}, "max_num_seqs must be an integer"),
        ({"max_num_batched_tokens": 1.5}, "got 1.5"),
        ({"max_model_len": "4k"}, "got '4k'"),
        ({"kv_layout": "ring"}, "kv_layout must be one of paged, slab, got 'ring'"),
        ({"reorder": "swap"}, "reorder must be one of off, move, indirect"),
        ({"policy": "dynamic"}, "policy must be one of"),
        ({"order": "lifo"}, "order must be one of"),
        ({"overlap_depth": 2}, "overlap_depth must be 0 or 1, got 2"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"seed": 2**64}, "seed must be below"),
        ({"batch_invariant": 1}, "batch_invariant must be True or False"),
        ({"model": ""}, "model must be a name or a folder"),
        ({"num_kv_blocks": 4, "kv_cache_memory_bytes": 4}, "not both"),
        ({"num_kv_blocks": 4, "kv_layout": "slab"}, "num_kv_blocks is for kv_layout='paged'"),
    ],
)
def test_wrong_setting_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        EngineConfig(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": []}, "must name one architecture"),
        ({"auto_map": {"AutoModel": "x"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "awq"}}, "(awq)"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"num_key_value_heads": 3}, "not divisible by num_key_value_heads 3"),
        ({"hidden_size": 1000}, "hidden_size 1000 is not divisible"),
    ],
)
def test_wrong_model_config_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        ModelConfig.from_dict({**HF, **change})
    assert message in str(error.value)


def test_generation_config_wins_on_eos() -> None:
    assert ModelConfig.from_dict(HF).eos_token_ids == (1, 2)
    assert ModelConfig.from_dict(HF, {"eos_token_id": 7}).eos_token_ids == (7,)


def resolved(memory: int = 16 * GIB, weights: int = GIB, device: str = "cpu", **options: Any) -> Any:
    return resolve(EngineConfig(**options), ModelConfig.from_dict(HF), Hardware(device, memory), weights)


def test_defaults_fit_the_machine() -> None:
    config = resolved()
    assert config.engine.dtype == "float32"
    assert config.kv.num_blocks * config.kv.block_size * TOKEN_BYTES <= 4 * GIB
    assert config.scheduler.max_model_len == 4096
    assert resolved(device="cuda").engine.dtype == "float32"  # the checkpoint's own


def test_small_memory_cuts_the_context_and_says_so() -> None:
    config = resolved(memory=int(1.2 * GIB))
    assert 0 < config.scheduler.max_model_len < 4096
    assert {s.name: s.origin for s in config.settings}["max_model_len"] == "machine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": GIB}, "the weights take 1.0 GiB but only 1.0 GiB is free"),
        ({"memory": int(1.2 * GIB), "max_model_len": 4096}, "max_model_len="),
        ({"kv_layout": "slab", "max_num_seqs": 500}, "would fit"),
        ({"kv_cache_memory_bytes": 100 * GIB}, "is left beside the weights"),
        ({"num_kv_blocks": 10**7}, "would fit"),
        ({"max_model_len": 5000}, "longer than the model's 4096 positions"),
    ],
)
def test_what_cannot_fit_says_what_would(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        resolved(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("device", "memory", "options", "choices"),
    [
        ("cpu", GIB, {}, ["dtype='bfloat16'", "quantization='int8'"]),
        ("cpu", int(0.5 * GIB), {}, ["quantization='int8'"]),
        ("cpu", int(0.2 * GIB), {}, ["only a smaller model"]),
        ("cuda", int(0.2 * GIB), {}, ["tensor_parallel_size=8"]),
        ("cuda", GIB, {"dtype": "bfloat16", "quantization": "int8"}, ["tensor_parallel_size=2"]),
        ("cuda", int(1.3 * GIB), {"kv_layout": "slab", "max_num_seqs": 5}, None),
        ("cuda", int(1.12 * GIB), {"max_model_len": 4096}, None),
        ("cpu", 16 * GIB, {"kv_layout": "slab", "max_num_seqs": 20}, None),
        ("cuda", int(GIB / 0.9) + 99, {"num_kv_blocks": 10}, ["not one block"]),
        ("cuda", int(1.12 * GIB), {"max_model_len": 4096, "kv_cache_dtype": "fp8", "kv_layout": "slab"}, None),
    ],
)
def test_only_what_would_fit_is_named(
    device: str, memory: int, options: dict[str, Any], choices: list[str] | None
) -> None:
    with pytest.raises(ValueError, match=" would fit$") as error:
        resolved(memory=memory, device=device, **options)
    named = str(error.value).replace("; ", ": ").removesuffix(" would fit").rpartition(": ")[2].split(" or ")
    assert choices is None or named == choices
    for choice in named if choices is None else ():
        name, _, value = choice.partition("=")
        ranks = int(value) if name == "tensor_parallel_size" else 1
        change = {name: int(value) if value.isdigit() else value.strip("'")}
        assert resolved(memory=memory, weights=GIB // ranks, device=device, **(options | change)), choice
        if ranks > 2:  # the fewest: half of them hold twice the weights
            with pytest.raises(ValueError, match="fit"):
                resolved(memory=memory, weights=2 * GIB // ranks, device=device, **(options | {name: ranks // 2}))
    assert "=0" not in str(error.value)


def test_a_step_that_does_not_fit_may_be_made_smaller() -> None:
    with pytest.raises(
        ValueError, match=r"256\.0 MiB too much; a smaller max_num_batched_tokens or max_num_seqs or dt"
    ):
        resolve(EngineConfig(), ModelConfig.from_dict(HF), Hardware("cuda", int(2 * GIB / 0.9)), GIB, int(1.25 * GIB))


def test_ranks_on_gpus() -> None:
    ranks = {"device": "cuda", "pipeline_parallel_size": 3, "tensor_parallel_size": 2}
    config = resolved(**ranks)
    assert config.kv.bytes_per_token == 2 * 6 * 4 * 64 * 4  # of the stage with most layers
    assert resolved(prefill_mode="separate", **ranks)
    with pytest.raises(ValueError, match="^prefill_mode='overlap' with 6 ranks .* 'mixed' and 'separate' work$"):
        resolved(prefill_mode="overlap", **ranks)


def test_suggestion_for_a_slab_is_true() -> None:
    with pytest.raises(ValueError, match="max_num_seqs=") as error:
        resolved(kv_layout="slab", max_num_seqs=500)
    fits = int(str(error.value).split("max_num_seqs=")[-1].split()[0])
    assert resolved(kv_layout="slab", max_num_seqs=fits).kv.num_blocks == fits


def test_origins_are_recorded() -> None:
    settings = {s.name: s for s in resolved(max_num_seqs=7).settings}
    assert settings["max_num_seqs"].origin == "given"
    assert settings["dtype"].value == "float32"
    assert settings["policy"].origin == "default"


def test_the_size_of_the_cache_has_its_reason() -> None:
    for seqs, reason in ((1, "for 1 requests of 4096 tokens"), (None, "in 4.0 GiB")):
        settings = {s.name: s for s in resolved(max_num_seqs=seqs).settings}
        assert settings["num_kv_blocks"].reason.endswith(reason)


def test_decisions_import_no_torch() -> None:
    code = (
        "import sys, flover, flover.config, flover.request, flover.metrics, flover.kv.slab, flover.kv.paged, "
        "flover.engine.policy, flover.engine.batch, flover.engine.scheduler; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
