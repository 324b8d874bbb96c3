"""Quantisation at load, through the engine: what is quantised, what it takes, who is refused, and the same tokens.

Statement (c) of the design holds for weights of 8 bits as it stands. With tokens of 8 bits a difference in the last bit
of an activation can become one in its eighth, so there (c) is stated in fp64, where that is as good as impossible.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import echo_folder
from test_same_tokens import make_requests, trace
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flover import LLM, SamplingParams
from flover.config import CHOICES, EngineConfig, Hardware
from flover.engine import engine
from flover.layers.linear import Linear
from flover.model_config import ModelConfig
from flover.models import loader
from flover.models.checkpoint import PIECE
from flover.resolve import resolve

NAMES = [name for name in CHOICES["quantization"] if name != "none"]
MODELS = ["kjv-llama", "kjv-gpt2"]
INPUT = {"prompt_token_ids": [5, 6, 7, 8, 9, 10, 11]}


def load(model: str, quantization: str, **options: Any) -> tuple[Any, ModelConfig, Path]:
    folder = loader.resolve_model(model)
    config = ModelConfig.from_folder(folder)
    options = {"dtype": torch.float32, "device": "cpu", "quantization": quantization, **options}
    return loader.load_model(folder, config, **options), config, folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_it_reads_like_the_model(model: str, name: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0, prompt_logprobs=0)
    scores = {}
    for quantization in ("none", name):
        with LLM(model, device="cpu", quantization=quantization) as llm:
            out = llm.generate("And the LORD said unto Moses, Speak unto the children of", params)[0]
        assert len(out.outputs[0].token_ids) == 4
        scores[quantization] = [
            entry[t].logprob for t, entry in zip(out.prompt_token_ids, out.prompt_logprobs) if entry
        ]
    worst = max(abs(a - b) for a, b in zip(scores["none"], scores[name]))
    assert 1e-4 < worst < 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_what_is_quantised_and_its_bytes(model: str, name: str, load_format: str) -> None:
    module, config, folder = load(model, name, load_format=load_format)
    kind = torch.int8 if name.startswith("int8") else torch.float8_e4m3fn
    linears = {n: part for n, part in module.named_modules() if isinstance(part, Linear)}
    for where, part in linears.items():
        if where == "lm_head":
            assert part.weight.dtype == torch.float32
            assert part.scale is None
        else:
            assert part.weight.dtype == kind
            assert part.scale.shape == part.weight.shape[:1]
            assert bool((part.scale > 0).all())
    blocks = [part for where, part in linears.items() if where != "lm_head"]
    plain = loader.weight_bytes(folder, config, torch.float32)
    counted = loader.weight_bytes(folder, config, torch.float32, name)
    assert counted == sum(p.numel() * p.element_size() for p in module.parameters())
    assert counted == plain - sum(3 * part.weight.numel() - 4 * len(part.weight) for part in blocks)


def test_an_output_head_of_its_own_stays_as_it_is() -> None:
    config = replace(ModelConfig.from_folder(loader.resolve_model("kjv-llama")), tie_word_embeddings=False)
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "load_format": "dummy"}
    module: Any = loader.load_model("", config, quantization="int8", **options)
    assert module.lm_head.weight.dtype == torch.float32
    assert module.lm_head.weight is not module.embed.weight
    assert module.layers[0].mlp.down_proj.weight.dtype == torch.int8


def test_resolve_counts_the_quantised_size() -> None:
    _, model, _, weights = engine.survey(EngineConfig(device="cpu", quantization="int8"))
    plain = engine.survey(EngineConfig(device="cpu"))[3]
    room = Hardware("cpu", int((weights + plain) / 2 / 0.9))
    assert resolve(EngineConfig(max_num_seqs=1, max_model_len=16), model, room, weights).kv.num_blocks == 1
    with pytest.raises(ValueError, match="quantization"):
        resolve(EngineConfig(max_num_seqs=1, max_model_len=16), model, room, plain)


class LiveBytes(TorchDispatchMode):
    """The most bytes that the tensors made under it, and the model's parameters, held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None
        self.made: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.made = [r for r in self.made if r() is not None] + [weakref.ref(t) for t in tensors]
        alive = [r() for r in self.made] + list(self.model.parameters() if self.model else ())
        storages = [t.untyped_storage() for t in alive if t is not None and t.device.type == "cpu"]
        self.peak = max(self.peak, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        return out


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_loading_holds_the_quantised_model_and_one_parameter(load_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, skeleton = LiveBytes(), loader._skeleton

    def watched(*args: Any) -> nn.Module:
        watch.model = skeleton(*args)
        return watch.model

    monkeypatch.setattr(loader, "_skeleton", watched)
    monkeypatch.setattr("flover.layers.linear.SLICE", 1 << 14)
    with watch:
        module, config, folder = load("kjv-llama", "int8", load_format=load_format)
    final = sum(p.numel() * p.element_size() for p in module.parameters())
    largest = 4 * max(p.numel() for p in module.parameters())
    parts = largest if load_format == "auto" else 0  # read from the file, joined, and placed
    peak = watch.peak - (PIECE["cpu"] if load_format == "auto" else 0)  # the buffer through which conversions go
    assert final < peak <= final + largest + parts + 8 * 4 * (1 << 14)
    assert peak < 0.75 * loader.weight_bytes(folder, config, torch.float32)


@pytest.mark.parametrize(
    ("model", "name"),
    [("kjv-llama", "int8_w8a8"), ("kjv-gpt2", "int8"), ("kjv-gpt2", "fp8_w8a8")],
)
def test_fp64_tokens_are_equal_alone_and_fused(model: str, name: str) -> None:
    options = {"dtype": "float64", "quantization": name}
    serial = trace(model, make_requests(3, count=4), policy="serial", overlap_depth=0, **options)
    fused = trace(model, make_requests(3, count=4), max_num_batched_tokens=24, **options)
    assert fused.tokens == serial.tokens
    for request, rows in serial.logits.items():
        for a, b in zip(rows, fused.logits[request]):
            assert float((a - b).abs().max()) <= 1e-10 * float(a.std())


@pytest.mark.parametrize(("model", "name"), [("kjv-llama", "int8"), ("kjv-gpt2", "fp8")])
def test_fp32_logits_agree_when_teacher_forced(model: str, name: str) -> None:
    serial = trace(model, make_requests(2, count=4), policy="serial", overlap_depth=0, quantization=name)
    forced = trace(model, make_requests(2, count=4), forced=serial, quantization=name, max_num_batched_tokens=24)
    for request, rows in serial.logits.items():
        for a, b in zip(rows, forced.logits[request]):
            assert float((a - b).abs().max()) <= 1e-4 * float(a.std())


@pytest.mark.parametrize("name", ["int8", "fp8_w8a8"])
def test_batch_invariant_logits_are_bit_equal(name: str) -> None:
    options = {"batch_invariant": True, "quantization": name}
    serial = trace("kjv-llama", make_requests(3, count=4), policy="serial", overlap_depth=0, **options)
    fused = trace("kjv-llama", make_requests(3, count=4), max_num_batched_tokens=24, **options)
    for request, rows in serial.logits.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, fused.logits[request], strict=True))


def test_a_gpu_too_old_for_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "detect_hardware", lambda _: Hardware("cuda", 1 << 34))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    for name in ("fp8", "fp8_w8a8"):
        with pytest.raises(ValueError, match=r"too old for fp8 .*quantization=.int8") as caught:
            engine.survey(EngineConfig(quantization=name))
        assert "\n" not in str(caught.value)
    engine.survey(EngineConfig(quantization="int8_w8a8"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    engine.survey(EngineConfig(quantization="fp8_w8a8"))


def test_settings() -> None:
    with pytest.raises(
        ValueError, match="quantization must be one of none, int8, fp8, int8_w8a8, fp8_w8a8, got 'int4'"
    ):
        EngineConfig(quantization="int4")


def test_a_model_without_linear_layers(tmp_path: Path) -> None:
    with LLM(str(echo_folder(tmp_path / "echo")), load_format="dummy", device="cpu", quantization="int8") as llm:
        out = llm.generate(INPUT, SamplingParams(max_tokens=3))
    assert len(out[0].outputs[0].token_ids) == 3
